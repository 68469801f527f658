"""Hold the logic between measurements and tables: what is drawn, allowed, compared and written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.harness import record as recording
from benchmarks.model import report as model_report
from benchmarks.model.batches import BETTER_RUNTIME, MODEL_FIGURES, MODEL_SHAPES, Batch, ModelShape, draw_batches
from benchmarks.model.checking import Tolerance, Truth, check, check_call, largest_difference, tolerance
from benchmarks.model.measure import judge
from benchmarks.model.rivals import candidate_names
from deberta_kernels.testing import budget
from tests import needs

RAGGED = next(shape for shape in MODEL_SHAPES if shape.fill < 1.0)
SAMPLE_FIELDS = ("median", "minimum", "p20", "p80", "wall_median", "wall_minimum")


def _samples(seconds: float) -> dict[str, Any]:
    return {**dict.fromkeys(SAMPLE_FIELDS, seconds), "rounds": 3, "inner": 1}


def _record(shape: ModelShape, seconds: dict[str, float], **values: Any) -> dict[str, Any]:
    record = {**shape.__dict__, "label": shape.label, "checks": {}, "missing": {}}
    return {**record, "samples": {name: _samples(x) for name, x in seconds.items()}, **values}


def _pick(samples: dict[str, Any]) -> tuple[float, float]:
    return samples["median"], samples["minimum"]


def _line(records: list[dict[str, Any]], shape: ModelShape, other: str, *rates: dict[str, float]) -> Any:
    lines = judge(records, _pick, *rates)
    return next(x for x, f in zip(lines, MODEL_FIGURES, strict=True) if f.shape == shape and f.other == other)


def _result(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": "model",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": {"id": "0123456789abcdef", "modified": False},
        "device": "some-processor",
        "machine": {"processor": "some processor", "family": "", "model": "", "load_average": [0.5]},
        "versions": {"torch": "2", "torch_isa": "AVX2", "transformers": "5", "python": "3"},
        "library": {"isa": "avx2", "stale": False},
        "settings": {"threads": 1, "clock": "process CPU time", "backend": "cpu", "quick": False, "model": "a model"},
        "rates_gflops": {"torch mm float32": 1.0},
        "models": records,
        "figures": [line.as_json() for line in judge(records, _pick)],
        "load_average_after": [0.6],
        "seconds": 1.0,
    }


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


def test_every_shape_is_compared_with_eager_a_runtime_and_bert() -> None:
    for shape in MODEL_SHAPES:
        others = {figure.other for figure in MODEL_FIGURES if figure.shape == shape}
        assert {"eager", BETTER_RUNTIME, "bert"} <= others
        assert {"eager", "patched", "openvino", "bert"} <= set(candidate_names(shape))
    assert "padded" in {figure.other for figure in MODEL_FIGURES if figure.shape == RAGGED}


def test_the_faster_runtime_counts() -> None:
    shape = ModelShape(1, 128)
    record = _record(shape, {"eager": 6.0, "patched": 2.0, "onnxruntime": 3.0, "openvino": 2.5, "bert": 1.0})
    line = _line([record], shape, BETTER_RUNTIME)
    assert line.median == pytest.approx(1.25)
    assert line.case.endswith("openvino")
    assert _line([record], shape, "eager").median == pytest.approx(3.0)
    assert _line([record], shape, "bert").median == pytest.approx(2.0)


def test_a_bound_beyond_the_peak_of_the_machine_is_told_apart() -> None:
    shape = ModelShape(1, 128)
    record = _record(shape, {"eager": 6.0, "patched": 4.0}, needed_gflop=300.0)
    rates = {"torch mm float32": 80.0, "oneDNN linear float32": 100.0, "torch linear bfloat16": 1e9}
    line = _line([record], shape, "eager", rates)
    assert line.at_peak == pytest.approx(2.0)
    assert line.verdict == "MISSED"
    assert _line([record], shape, "eager", {"torch mm float32": 10.0}).at_peak is None


def test_a_lost_shape_stays_and_is_missed() -> None:
    shape = ModelShape(1, 128)
    line = _line([_record(shape, {"patched": 4.0, "onnxruntime": 2.0})], shape, BETTER_RUNTIME)
    assert line.median == pytest.approx(0.5)
    assert line.verdict == "MISSED"


def test_a_wrong_rival_is_kept_out_of_the_ratios_and_named() -> None:
    shape = ModelShape(1, 128)
    wrong = {"openvino": {"ok": False, "text": "too far"}}
    record = _record(shape, {"eager": 6.0, "patched": 2.0, "onnxruntime": 3.0}, checks=wrong)
    assert _line([record], shape, BETTER_RUNTIME).median == pytest.approx(1.5)
    missing = {"onnxruntime": "not installed: onnxruntime"}
    record = _record(shape, {"eager": 6.0, "patched": 2.0}, checks=wrong, missing=missing)
    line = _line([record], shape, BETTER_RUNTIME)
    assert line.verdict == "none"
    assert "openvino gave a wrong answer" in line.reason
    assert "not installed: onnxruntime" in line.reason
    assert "wrong" in model_report.text(_result([record]))


def test_a_wrong_answer_of_ours_is_red() -> None:
    shape = ModelShape(1, 128)
    record = _record(shape, {"eager": 6.0}, checks={"patched": {"ok": False, "text": "too far"}})
    assert {x.verdict for x in judge([record], _pick) if not x.reason.startswith("not in")} == {"RED"}


def test_shapes_that_were_not_run_are_no_rows() -> None:
    record = _record(ModelShape(1, 128), {"eager": 6.0, "patched": 2.0, "bert": 1.0})
    text = report.table(_result([record]))
    assert "1x2048" not in text
    assert "not in this run" in text.splitlines()[-1]


def _problem() -> tuple[ModelShape, Batch, torch.Tensor, Truth]:
    shape = ModelShape(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    truth = Truth(torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return shape, Batch(mask, mask), truth.hidden.float() + 1e-5, truth


def test_the_tolerance_comes_from_the_error_of_eager() -> None:
    shape, batch, eager, truth = _problem()
    factor, relative = budget.LIMITS[torch.float32]
    found = tolerance(shape, batch, eager, truth, [])
    assert found.eager_error == pytest.approx(1e-5, rel=0.1)
    largest = max(1.0, float(truth.hidden.abs().max()))
    assert found.bound == pytest.approx(factor * (found.eager_error + relative * largest))
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


def test_a_result_is_stored_by_kind_date_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    record = _record(RAGGED, {"eager": 6.0, "patched": 1.0, "padded": 2.0, "bert": 2.0})
    recording.store(_result([record]), "")
    path = tmp_path / "some-processor" / "model-2026-01-02-030405-01234567.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert report.kind_of(stored) == "model"
    assert stored["figures"]
    recording.store(_result([record]), "-")
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_report_writes_tables_between_the_markers_of_its_kind_and_draws(tmp_path: Path) -> None:
    records = [_record(shape, {"eager": 6.0, "patched": 1.0, "bert": 2.0}) for shape in MODEL_SHAPES]
    records[0]["samples"]["onnxruntime"] = _samples(3.0)
    result = _result(records)
    result["peaks"] = [{**RAGGED.__dict__, "label": RAGGED.label, "bytes": {"eager": 5e6, "patched": "error"}}]
    path, readme, picture = tmp_path / "model.json", tmp_path / "README.md", tmp_path / "model.png"
    path.write_text(json.dumps(result), encoding="utf-8")
    readme.write_text("before\n<!-- bench-model:begin -->\nold\n<!-- bench-model:end -->\nafter\n", encoding="utf-8")
    needs.package("matplotlib")
    assert report.main([str(path), "--plot", str(picture), "--update", str(readme)]) == 0
    content = readme.read_text(encoding="utf-8")
    assert content.startswith("before\n")
    assert content.endswith("after\n")
    assert "old" not in content
    assert "| 8x128 60% full float32 | 5 | failed |" in content
    assert picture.stat().st_size > 0
