"""Whole models: the batches they run on, and the tolerance that eager's own error sets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.model import peaks
from benchmarks.model.batches import Batch, draw_batches
from benchmarks.model.checking import Tolerance, Truth, check, check_call, largest_difference, tolerance
from benchmarks.registry import CANDIDATES, MODEL_SHAPES, RUNTIMES, ModelShape
from deberta_kernels.testing import budget

MODELS = CANDIDATES["model"]
RAGGED = next(shape for shape in MODEL_SHAPES if shape.fill < 1.0)


def test_ragged_batches_have_the_fill_asked_for_and_one_full_sample() -> None:
    for batch in draw_batches(RAGGED, 100):
        lengths = batch.attention_mask.sum(1)
        assert int(lengths.sum()) == round(RAGGED.fill * RAGGED.batch * RAGGED.length)
        assert int(lengths.max()) == RAGGED.length
        assert int(lengths.min()) >= 1
        # Padding is on the right, and has the id of padding.
        assert bool((batch.attention_mask.diff(dim=1) <= 0).all())
        assert bool((batch.input_ids[batch.attention_mask == 0] == 0).all())
        assert bool((batch.input_ids[batch.attention_mask == 1] > 0).all())


def test_batches_rotate_and_are_the_same_in_both_dtypes() -> None:
    first, second = (draw_batches(ModelShape(2, 16, dtype), 100) for dtype in ("float32", "bfloat16"))
    assert len({tuple(batch.input_ids.flatten().tolist()) for batch in first}) == len(first)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))


def _problem() -> tuple[ModelShape, Batch, torch.Tensor, Truth]:
    shape = ModelShape(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    truth = Truth(torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return shape, Batch(mask, mask), truth.hidden.float() + 1e-5, truth


def test_the_tolerance_comes_from_the_error_of_eager() -> None:
    shape, batch, eager, truth = _problem()
    factor, _ = budget.LIMITS[torch.float32]
    found = tolerance(shape, batch, eager, truth, [])
    assert found.eager_error == pytest.approx(1e-5, rel=0.1)
    largest = float(truth.hidden.abs().max())
    assert found.bound == pytest.approx(budget.allowance(torch.float32, found.eager_error, largest))
    assert found.between == pytest.approx(found.bound + found.bound / factor)


def test_without_float64_the_widest_measured_bound_serves() -> None:
    shape, batch, eager, _ = _problem()
    narrow, wide, borrowed = Tolerance(1.0, 3.0, 4.0), Tolerance(2.0, 6.0, 8.0), Tolerance(9.0, 27.0, 36.0, False)
    found = tolerance(shape, batch, eager, None, [narrow, wide, borrowed])
    assert (found.bound, found.between, found.measured) == (6.0, 8.0, False)
    with pytest.raises(ValueError, match="measure a shorter one"):
        tolerance(shape, batch, eager, None, [borrowed])


def test_only_rows_of_real_tokens_are_compared() -> None:
    shape, batch, eager, truth = _problem()
    allowed = tolerance(shape, batch, eager, truth, [])
    got = eager.clone()
    got[0, 3] = 100.0
    assert check(got, eager, batch, truth, allowed).ok
    got[0, 2] += 1.0
    assert not check(got, eager, batch, truth, allowed).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_fail(bad: float) -> None:
    shape, batch, eager, truth = _problem()
    allowed = tolerance(shape, batch, eager, truth, [])
    got = eager.clone()
    got[1, 0, 0] = bad
    assert not check(got, eager, batch, truth, allowed).ok
    assert not largest_difference(got, eager, batch.attention_mask) <= allowed.between


def test_a_rival_that_raises_or_returns_another_shape_has_failed() -> None:
    shape, batch, eager, truth = _problem()
    allowed = tolerance(shape, batch, eager, truth, [])

    def broken(_: Batch) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    assert "no such kernel" in check_call(broken, eager, batch, truth, allowed).text
    assert "shape" in check_call(lambda _: eager[:, :2], eager, batch, truth, allowed).text


def test_a_candidate_whose_package_is_missing_costs_no_other_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    needy = {name: replace(x, needs=("no_such_package",) if name in RUNTIMES else ()) for name, x in MODELS.items()}
    monkeypatch.setitem(CANDIDATES, "model", needy)
    monkeypatch.setattr(peaks, "run_alone", lambda function, threads, **arguments: {"bytes": 5})
    kept: dict[str, Any] = {}

    class Run:
        backend, threads = "cpu", 1
        keep = staticmethod(kept.update)

    class Models:
        source = ""

        def exported(self) -> None:
            raise RuntimeError("Module onnx is not installed!")

    shape = ModelShape(1, 512)
    peaks.measure_peaks(Run(), Models(), [shape, ModelShape(1, 32)])
    assert kept["peaks"] == [
        {**shape.__dict__, "label": "1x512", "bytes": dict.fromkeys(("eager", "patched", "bert"), 5)}
    ]


def test_large_models_are_stored_by_what_differs_from_v3_base(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bytes": 4e8, "weights": 3e9}
    monkeypatch.setattr(peaks, "run_alone", lambda function, threads, **arguments: found)
    monkeypatch.setattr(peaks, "free", lambda: 4e9)
    kept: dict[str, Any] = {}

    class Run:
        backend, threads, quick = "cpu", 1, False

        @staticmethod
        def keep(lines: Any, memory: Any) -> None:
            kept.update(lines=lines, memory={record["name"]: record for record in memory})

    peaks.measure_large(Run())
    assert kept["memory"]["document"]["settings"] == {}
    assert kept["memory"]["layer-32768"]["settings"] == {"num_hidden_layers": 1}
    assert set(kept["memory"]["v2-xxlarge"]["settings"]) == {
        "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
        "conv_kernel_size", "conv_act",
    }  # fmt: skip
    verdicts = [line.verdict for line in kept["lines"]]
    assert verdicts == ["none", "info", "info", "must", "none"]
    assert "4.0 GB of memory are free, 6 needed" in kept["lines"][0].reason
