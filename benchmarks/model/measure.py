"""Check and time whole models, shape by shape, and turn the times into the lines of the figures table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.core.measure import Line, Plan
from benchmarks.harness.clock import Pace, interleave
from benchmarks.model.batches import BETTER_RUNTIME, MODEL_FIGURES, Batch, ModelShape, draw_batches
from benchmarks.model.checking import Tolerance, Truth, check_call, tolerance, truths
from benchmarks.model.rivals import Call, build, candidate_names, export, load_plain, missing_packages
from benchmarks.registry import Figure, needed_flops_of_model

__all__ = ["RUNTIMES", "Workshop", "judge", "measure_shapes"]

RUNTIMES = ("onnxruntime", "openvino")
# Large batches take tens of seconds a call in eager.
PACE, QUICK_PACE = Pace(rounds=15, least=3, seconds=25.0), Pace(rounds=3, least=2, seconds=3.0)


@dataclass
class Workshop:
    """Hold what the shapes of one run share.

    Attributes:
        plan: how to measure.
        source: directory of a checkpoint, or "" for random weights.
    """

    plan: Plan
    source: str
    _models: dict[str, Any] = field(default_factory=dict)
    _exported: Path | None = None

    def plain(self, dtype: str) -> Any:
        """Return the eager model in a dtype; that in float32 is the one the others are made from."""
        if dtype not in self._models:
            first = self._models.setdefault("float32", self._models.get("float32") or load_plain(self.source))
            if dtype != "float32":
                self._models[dtype] = copy.deepcopy(first).to(getattr(torch, dtype))
        return self._models[dtype]

    def exported(self) -> Path:
        """Return the exported file, written when first needed."""
        if self._exported is None:
            self._exported = export(self.plain("float32"), self.source)
        return self._exported

    def call(self, name: str, shape: ModelShape) -> Call:
        """Return the forward of a candidate."""
        if name in RUNTIMES:
            return build(name, shape, None, self.exported(), self.plan.backend)
        return build(name, shape, self.plain(shape.dtype), None, self.plan.backend)


def measure_shapes(
    workshop: Workshop, shapes: Iterable[ModelShape], finished: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Check and time every candidate of every shape.

    Args:
        workshop: see there.
        shapes: in this order, short ones before long ones.
        finished: called with all records so far after each shape, so that an interrupted run leaves something.
    """
    plain, note = workshop.plain("float32"), workshop.plan.note
    batches = {shape: draw_batches(shape, plain.config.vocab_size) for shape in shapes}
    note("float64 results to check against")
    known = truths(plain, {shape: found[0] for shape, found in batches.items()})
    records: list[dict[str, Any]] = []
    allowed: dict[str, list[Tolerance]] = {}
    for shape, found in batches.items():
        records.append(_measure(workshop, shape, found, known.get(shape), allowed.setdefault(shape.dtype, [])))
        finished(records)
    return records


def _measure(
    workshop: Workshop, shape: ModelShape, batches: list[Batch], truth: Truth | None, shorter: list[Tolerance]
) -> dict[str, Any]:
    plan, title = workshop.plan, f"{shape.label} {shape.dtype}"
    record: dict[str, Any] = {**shape.__dict__, "label": shape.label, "checks": {}, "samples": {}, "missing": {}}
    record["lengths"] = [batch.attention_mask.sum(1).tolist() for batch in batches]
    if not workshop.source:
        needed = [needed_flops_of_model(lengths) for lengths in record["lengths"]]
        record["needed_gflop"] = sum(needed) / len(needed) / 1e9
    calls: dict[str, Call] = {}
    for name in candidate_names(shape):
        if absent := missing_packages(name):
            record["missing"][name] = f"not installed: {', '.join(absent)}"
            continue
        try:
            calls[name] = workshop.call(name, shape)
        except Exception as error:  # a rival that cannot be built leaves the others to be measured
            record["missing"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            plan.note(f"{title}: {name}: {record['missing'][name]}")
    eager = calls["eager"](batches[0])
    limits = tolerance(shape, batches[0], eager, truth, shorter)
    shorter.append(limits)
    record["tolerance"] = limits.as_json()
    for name in [name for name in calls if name not in ("eager", "bert")]:
        outcome = check_call(calls[name], eager, batches[0], truth, limits)
        record["checks"][name] = {**outcome.as_json(), "text": outcome.text}
        if not outcome.ok:
            plan.note(f"{title}: {name} is RED, not timed: {outcome.text}")
            del calls[name]
    pace = QUICK_PACE if plan.quick else PACE
    samples = interleave({name: _turning(call, batches) for name, call in calls.items()}, pace)
    record["samples"] = {name: x.as_json() for name, x in samples.items()}
    times = (f"{name} {plan.pick(x)[0] * 1e3:.0f}" for name, x in record["samples"].items())
    plan.note(f"{title}, ms: {', '.join(times)}")
    return record


def _turning(call: Call, batches: list[Batch]) -> Callable[[int], object]:
    return lambda index: call(batches[index % len(batches)])


Pick = Callable[[dict[str, Any]], tuple[float, float]]


def judge(records: list[dict[str, Any]], pick: Pick, rates: dict[str, float | None] | None = None) -> list[Line]:
    """Return the lines of all figures.

    Args:
        records: of `measure_shapes`.
        pick: samples of a candidate -> median and minimum, seconds.
        rates: GFLOP/s of matrix products, whose names end in their dtype; the highest bounds what can be reached.
    """
    by_shape = {(r["label"], r["dtype"]): r for r in records}
    peaks: dict[str, float] = {}
    for name, rate in (rates or {}).items():
        dtype = name.split()[-1]
        peaks[dtype] = max(peaks.get(dtype, 0.0), rate or 0.0)
    return [
        _line(figure, by_shape.get((figure.shape.label, figure.shape.dtype)), pick, peaks.get(figure.shape.dtype))
        for figure in MODEL_FIGURES
    ]


def _line(figure: Figure, record: dict[str, Any] | None, pick: Pick, peak: float | None) -> Line:
    def line(case: str = figure.shape.label, **values: Any) -> Line:
        unit = "x" if figure.sense == "speed" else ""
        return Line(figure.group, figure.title, case, figure.must, figure.aim, figure.sense != "time", unit, **values)

    if record is None:
        return line(reason="not in this run")
    if not record["checks"].get(figure.ours, {"ok": True})["ok"]:
        return line(reason=f"RED: {figure.ours} is over the tolerance or failed")
    others = RUNTIMES if figure.other == BETTER_RUNTIME else (figure.other,)
    timed = {name: pick(record["samples"][name]) for name in (figure.ours, *others) if name in record["samples"]}
    rivals = {name: times for name, times in timed.items() if name != figure.ours}
    if figure.ours not in timed or not rivals:
        return line(reason="; ".join(_why(record, name) for name in (figure.ours, *others) if name not in timed))
    ours = timed[figure.ours]
    median, minimum = (min(times[index] for times in rivals.values()) for index in (0, 1))
    case = figure.shape.label
    if len(others) > 1:
        case += f", {min(rivals, key=lambda name: rivals[name][0])}"
    shortest = record["needed_gflop"] / peak if peak and "needed_gflop" in record else None
    # A model faster than the peak means that a busy machine lowered the peak: then it bounds nothing.
    credible = shortest is not None and shortest <= ours[1] and figure.other != "padded"
    at_peak = figure.value(shortest, minimum) if shortest is not None and credible else None
    return line(case, median=figure.value(ours[0], median), best=figure.value(ours[1], minimum), at_peak=at_peak)


def _why(record: dict[str, Any], name: str) -> str:
    if name in record["missing"]:
        return f"{name}: {record['missing'][name]}"
    if not record["checks"].get(name, {"ok": True})["ok"]:
        return f"{name} gave a wrong answer"
    return f"{name} is no candidate here"
