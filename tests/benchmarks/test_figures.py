"""The registry of shapes and figures, and the judge that holds figures to their bars."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import registry
from benchmarks.core import candidates
from benchmarks.core import run as core
from benchmarks.harness import tables
from benchmarks.harness.clock import Pace
from benchmarks.harness.figures import Figure, Line, judge
from benchmarks.harness.record import Run
from benchmarks.listing import FIGURES
from benchmarks.model.rivals import candidate_names
from benchmarks.model.run import judged
from benchmarks.registry import CORE_FIGURES, MODEL_FIGURES, MODEL_SHAPES, RUNTIMES, ModelShape, Shape
from tests.benchmarks.results import record, result, run, samples

RAGGED = next(shape for shape in MODEL_SHAPES if shape.fill < 1.0)


def _line(records: list[dict[str, Any]], shape: ModelShape, *others: str, **rates: float) -> Any:
    pairs = zip(judged(run(**rates), records), MODEL_FIGURES, strict=True)
    return next(line for line, figure in pairs if figure.shape == shape and figure.others == others)


def test_every_shape_is_compared_with_eager_a_runtime_bert_and_the_peak() -> None:
    for shape in MODEL_SHAPES:
        others = {figure.others for figure in MODEL_FIGURES if figure.shape == shape}
        assert {("eager",), RUNTIMES, ("bert",), ()} <= others
        assert {"eager", "patched", "openvino", "bert"} <= set(candidate_names(shape))
        assert ("onnxruntime" in candidate_names(shape)) is (shape.dtype == "float32")
    assert ("padded",) in {figure.others for figure in MODEL_FIGURES if figure.shape == RAGGED}


def test_a_figure_stands_once_and_has_one_bar() -> None:
    for kind, figures in FIGURES.items():
        names = [(figure.title, figure.line().case) for figure in figures]
        assert len(set(names)) == len(names), kind
    core = {figure.shape.length: figure.must for figure in registry.CORE_MODEL_FIGURES}
    model = {
        figure.shape.length: figure.must
        for figure in MODEL_FIGURES
        if figure.others == ("eager",) and figure.shape.dtype == "float32" and figure.shape.length in core
        and figure.shape.batch == 1
    }  # fmt: skip
    assert core == model


def test_every_candidate_of_a_figure_is_in_the_registry() -> None:
    for kind, figures in FIGURES.items():
        known = {*registry.CANDIDATES[kind], *(("unpatched", "patched") if kind == "core" else ())}
        assert {name for figure in figures for name in (figure.ours, *figure.others)} <= known


def test_the_core_has_a_bar_that_does_not_depend_on_the_code_of_others() -> None:
    shapes = {figure.shape for figure in CORE_FIGURES if figure.sense == "share" and figure.must}
    assert shapes == {Shape(*size, dtype) for size in registry.CORE_SIZES for dtype in ("float32", "bfloat16")}


def test_the_faster_runtime_counts() -> None:
    shape = ModelShape(1, 128)
    records = [record(shape, {"eager": 6.0, "patched": 2.0, "onnxruntime": 3.0, "openvino": 2.5, "bert": 1.0})]
    line = _line(records, shape, *RUNTIMES)
    assert line.median == pytest.approx(1.25)
    assert line.case.endswith("openvino")
    assert _line(records, shape, "eager").median == pytest.approx(3.0)
    assert _line(records, shape, "bert").median == pytest.approx(2.0)


def test_a_bound_beyond_the_peak_of_the_machine_is_told_apart() -> None:
    shape = ModelShape(1, 128)
    records = [record(shape, {"eager": 6.0, "patched": 4.0}, needed_gflop=400.0)]
    line = _line(records, shape, "eager", float32=100.0)
    assert line.at_peak == pytest.approx(1.5)
    assert line.verdict == "MISSED"
    rows = tables.figure_rows({"figures": [line.as_json()]})
    assert rows[1][-1] == "MISSED, out of reach on this machine"
    assert _line(records, shape, "eager", float32=10.0).at_peak is None


def test_the_share_of_the_peak_needs_no_other_candidate() -> None:
    shape = ModelShape(1, 128)
    records = [record(shape, {"patched": 4.0}, needed_gflop=340.0)]
    line = _line(records, shape, float32=100.0)
    assert (line.median, line.best, line.unit, line.verdict) == (pytest.approx(85.0), pytest.approx(85.0), "%", "must")
    assert "lowered" in _line(records, shape, float32=10.0).reason
    assert "no rate is known" in _line(records, shape).reason


def test_the_wall_clock_counts_with_several_threads() -> None:
    sample = samples(8.0, wall=2.0)
    assert run(1).pick(sample) == (8.0, 8.0)
    assert run(4).pick(sample) == (2.0, 2.0)


def test_a_lost_shape_stays_and_is_missed() -> None:
    shape = ModelShape(1, 128)
    line = _line([record(shape, {"patched": 4.0, "onnxruntime": 2.0})], shape, *RUNTIMES)
    assert line.median == pytest.approx(0.5)
    assert line.verdict == "MISSED"


def test_a_wrong_rival_is_kept_out_of_the_ratios_and_named() -> None:
    shape = ModelShape(1, 128)
    wrong = {"openvino": {"ok": False, "text": "too far"}}
    records = [record(shape, {"eager": 6.0, "patched": 2.0, "onnxruntime": 3.0}, checks=wrong)]
    assert _line(records, shape, *RUNTIMES).median == pytest.approx(1.5)
    missing = {"onnxruntime": "not installed: onnxruntime"}
    records = [record(shape, {"eager": 6.0, "patched": 2.0}, checks=wrong, missing=missing)]
    line = _line(records, shape, *RUNTIMES)
    assert line.verdict == "none"
    assert "openvino gave a wrong answer" in line.reason
    assert "not installed: onnxruntime" in line.reason
    assert "wrong" in tables.text(result(records))


def test_rivals_that_are_not_installed_are_one_line_each() -> None:
    missing = {name: f"not installed: {name}" for name in RUNTIMES}
    records = [record(shape, {"eager": 6.0, "patched": 2.0, "bert": 2.0}, missing=missing) for shape in MODEL_SHAPES]
    lines = [line for line in tables.text(result(records)).splitlines() if "not installed" in line]
    assert lines == [f"{name}: not installed: {name}" for name in RUNTIMES]


def test_a_wrong_answer_of_ours_is_red() -> None:
    shape = ModelShape(1, 128)
    records = [record(shape, {"eager": 6.0}, checks={"patched": {"ok": False, "text": "too far"}})]
    lines = [line for line in judged(run(), records) if line.reason != "not in this run"]
    assert {line.verdict for line in lines} == {"RED"}
    assert all("too far" in line.reason for line in lines)


def test_code_the_budget_comes_from_must_be_right_itself() -> None:
    figure = next(figure for figure in CORE_FIGURES if figure.others == ("huggingface",))
    found = {"samples": {}, "checks": {"huggingface": {"ok": False, "text": "too far"}}}
    assert judge(figure, found, run().pick, None).verdict == "RED"


@pytest.mark.parametrize(
    ("sense", "median", "best", "verdict"),
    [
        ("time", 0.5, 0.5, "aim"), ("time", 0.9, 0.8, "must"), ("time", 1.1, 0.9, "close"),
        ("time", 1.1, 1.2, "MISSED"),
        ("speed", 0.6, 0.6, "MISSED"), ("speed", 1.5, 1.5, "must"), ("speed", 3.0, 3.0, "aim"),
    ],
)  # fmt: skip
def test_medians_and_minima_both_have_to_reach_a_bar(sense: str, median: float, best: float, verdict: str) -> None:
    aim = 0.7 if sense == "time" else 2.0
    figure = Figure("group", "title", Shape(1, 128), "ours", ("other",), 1.0, aim, sense)
    assert figure.line(median=median, best=best).verdict == verdict


def test_without_a_bar_a_figure_informs_and_without_a_value_it_is_none() -> None:
    line = Line("group", "title", "case", None, None, True, "x", 1.0, 1.0)
    assert line.verdict == "info"
    assert Line("group", "title", "case", 1.0, None, True, "x").verdict == "none"


def test_shapes_that_were_not_run_are_no_rows() -> None:
    text = tables.text(result([record(ModelShape(1, 128), {"eager": 6.0, "patched": 2.0, "bert": 1.0})]))
    assert "1x2048" not in text
    assert "not in this run" in text.splitlines()[-1]


def test_a_core_of_others_in_the_registry_is_checked_timed_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    here, gone = registry.Candidate("another core", ("json",)), registry.Candidate("a lost core", ("no_such_package",))
    monkeypatch.setitem(registry.CANDIDATES, "core", {**registry.CANDIDATES["core"], "another": here, "lost": gone})
    monkeypatch.setitem(candidates.CORES, "another", candidates.hugging_face_core)
    made = run()
    made.quick, made.backend, made.result = True, "torch", {"kind": "cpu"}
    monkeypatch.setattr(Run, "keep", lambda self, lines=None, **values: self.result.update(values))
    monkeypatch.setattr(Run, "pace", Pace(1, 1, 0.1, 0.0))
    monkeypatch.setattr(core, "QUICK_SIZES", ((1, 128),))
    core.measure_core(made, frozenset(["eager"]))
    (found,) = made.result["core"]
    assert found["checks"]["another"]["ok"]
    assert found["samples"]["another"]["median"] > 0
    assert "another core" in tables.blocks(made.result)[0][0]
    assert tables.missing(made.result) == {"lost": "not installed: no_such_package"}
