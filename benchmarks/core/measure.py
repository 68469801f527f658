"""Turn shapes into measurements, and measurements into the lines of the figures table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.core.candidates import candidates, models
from benchmarks.core.checking import check_candidates, check_models
from benchmarks.harness import machine
from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.memory import extra_bytes
from benchmarks.registry import FIGURES, MODEL_LENGTHS, Figure, Shape, find, needed_flops

__all__ = ["CORE_GROUPS", "GROUPS", "Line", "Plan", "measure_core", "measure_memory", "measure_models"]

CORE_GROUPS = ("sdpa32", "sdpa16", "eager", "backward", "peak")
GROUPS = (*CORE_GROUPS, "model", "memory")
MEGABYTE = 1e6
MEMORY_MUST, MEMORY_AIM, GROWTH_MUST = 100.0, 60.0, 2.2
# Pages of the allocator and of Python's own objects, in bytes: growth below this is not growth.
MEMORY_NOISE = 4 << 20


@dataclass(frozen=True)
class Line:
    """Hold one line of the figures table.

    Attributes:
        group: for `--only`.
        title: what is compared.
        case: where: shape and form of the tables.
        must: bound that has to hold.
        aim: bound worth reaching, or None.
        higher: whether more is better.
        unit: "" for a time ratio, "x", "%" or "MB".
        median: value from the medians, or None when there is none.
        best: value from the minima; for memory the same.
        at_peak: what `best` would be if our forward did its needed FLOPs at the kernel's own GEMM peak, or None: a
            bound beyond it is out of reach on this machine.
        reason: why there is no value, or what is red.
    """

    group: str
    title: str
    case: str
    must: float | None
    aim: float | None
    higher: bool
    unit: str
    median: float | None = None
    best: float | None = None
    at_peak: float | None = None
    reason: str = ""

    def reaches(self, bound: float | None, value: float | None) -> bool:
        """Tell whether a value is on the right side of a bound; False when either is missing."""
        if bound is None or value is None:
            return False
        return value >= bound if self.higher else value <= bound

    @property
    def verdict(self) -> str:
        """Return "aim", "must", "close" (median or minima alone), "MISSED", "info", "RED" or "none"."""
        if self.reason:
            return "RED" if self.reason.startswith("RED") else "none"
        if self.must is None:
            return "info"
        for name, bound in (("aim", self.aim), ("must", self.must)):
            if self.reaches(bound, self.median) and self.reaches(bound, self.best):
                return name
        return "close" if self.reaches(self.must, self.median) or self.reaches(self.must, self.best) else "MISSED"

    def as_json(self) -> dict[str, Any]:
        """Return the fields and the verdict."""
        return {**self.__dict__, "verdict": self.verdict}


@dataclass(frozen=True)
class Plan:
    """Say what to run and how long.

    Attributes:
        groups: groups of figures wanted.
        backend: explicit backend of ours.
        threads: threads of everything; above 1 the wall clock counts instead of CPU time.
        quick: a part of the shapes, few rounds.
        note: called with one line of progress.
    """

    groups: frozenset[str]
    backend: str
    threads: int
    quick: bool
    note: Callable[[str], None] = field(default=print)

    @property
    def pace(self) -> Pace:
        """Return how long one shape is measured."""
        return Pace(9, 3, 2.0) if self.quick else Pace()

    def includes(self, shape: Shape) -> bool:
        """Tell whether a shape is measured; `--quick` keeps the small ones."""
        return not self.quick or (shape.batch, shape.length) in ((1, 128), (1, 512))

    def pick(self, samples: dict[str, Any]) -> tuple[float, float]:
        """Return the median and the minimum that count, in seconds."""
        if self.threads > 1:
            return samples["wall_median"], samples["wall_minimum"]
        return samples["median"], samples["minimum"]


def measure_core(plan: Plan) -> tuple[list[dict[str, Any]], list[Line]]:
    """Check and time every shape of the attention core that the plan wants."""
    shapes = list(dict.fromkeys(figure.shape for figure in FIGURES if figure.group in plan.groups))
    records = {}
    for shape in sorted(shapes, key=lambda s: (s.backward, s.dtype != "float32")):
        if plan.includes(shape):
            figures = find(shape, plan.groups)
            wanted = {figure.ours for figure in figures} | {figure.other for figure in figures if figure.other}
            if "huggingface" in wanted and shape.length <= 512 and shape.batch == 1:
                wanted.add("eager")  # the budget's own eager beside the original: they should agree
            records[shape] = _measure_shape(plan, shape, frozenset(wanted))
    peaks: dict[str, float] = {}
    for shape, record in records.items():
        peaks[shape.dtype] = max([peaks.get(shape.dtype, 0.0), *record["own_peak_gflops"]])
    wanted_figures = [figure for figure in FIGURES if figure.group in plan.groups]
    return list(records.values()), [_judge(plan, figure, records.get(figure.shape), peaks) for figure in wanted_figures]


def _line(figure: Figure, **values: Any) -> Line:
    form = {"prepared": ", prepared", "bare": ", bare"}[figure.ours] if figure.group != "backward" else ""
    higher = figure.sense != "time"
    unit = {"time": "", "speed": "x", "fraction": "%"}[figure.sense]
    must, aim = figure.must, figure.aim
    if figure.sense == "fraction":
        must, aim = (None if bound is None else 100 * bound for bound in (must, aim))
    return Line(figure.group, figure.title, figure.shape.label + form, must, aim, higher, unit, **values)


def _measure_shape(plan: Plan, shape: Shape, wanted: frozenset[str]) -> dict[str, Any]:
    title = f"{shape.label} {shape.dtype}" + (" forward + backward" if shape.backward else " forward")
    record: dict[str, Any] = {
        **shape.__dict__,
        "label": shape.label,
        "checks": {},
        "samples": {},
        "own_peak_gflops": [],
    }
    try:
        checks = check_candidates(shape, sorted(wanted), plan.backend)
    except (ImportError, MemoryError, RuntimeError) as error:
        record["reason"] = f"RED: the check itself failed: {type(error).__name__}: {error}"
        plan.note(f"{title}: {record['reason']}")
        return record
    record["checks"] = {name: check.as_json() for name, check in checks.items()}
    red = [check for check in checks.values() if not check.ok]
    for check in red:
        plan.note(f"{title}: RED, not timed\n{check.text}")
    timed = wanted - {name for name, check in checks.items() if not check.ok}
    peaks = [machine.own_peak(shape.dtype)]
    samples = interleave(candidates(shape, timed, plan.backend), plan.pace)
    peaks.append(machine.own_peak(shape.dtype))
    record["samples"] = {name: s.as_json() for name, s in samples.items()}
    record["own_peak_gflops"] = [round(peak, 2) for peak in peaks if peak is not None]
    plan.note(
        title + ": " + ", ".join(f"{name} {plan.pick(x)[0] * 1e3:.3f} ms" for name, x in record["samples"].items())
    )
    return record


def _judge(plan: Plan, figure: Figure, record: dict[str, Any] | None, peaks: dict[str, float]) -> Line:
    if record is None:
        return _line(figure, reason="not in --quick")
    if "reason" in record:
        return _line(figure, reason=record["reason"])
    for name in (figure.ours, figure.other):
        if not record["checks"].get(name, {"ok": True})["ok"]:
            return _line(figure, reason=f"RED: {name} is over the error budget or failed")
    ours = plan.pick(record["samples"][figure.ours])
    peak = peaks.get(figure.shape.dtype)
    shortest = needed_flops(figure.shape) / (peak * 1e9) if peak and plan.threads == 1 else None
    if figure.sense == "fraction":
        if shortest is None:
            return _line(figure, reason="not available: one thread and a backend with gemm_rate are needed")
        if shortest > ours[0]:
            return _line(figure, reason="not credible: faster than the peak, which a busy machine lowered")
        return _line(figure, median=100 * shortest / ours[0], best=100 * shortest / ours[1])
    other = plan.pick(record["samples"][figure.other])
    # A kernel faster than its peak means that a busy machine lowered the peak: then it bounds nothing.
    credible = shortest is not None and shortest <= ours[1] and not figure.shape.backward
    at_peak = figure.value(shortest, other[1]) if shortest is not None and credible else None
    values = {"median": figure.value(ours[0], other[0]), "best": figure.value(ours[1], other[1])}
    return _line(figure, **values, at_peak=at_peak)


def measure_models(plan: Plan) -> tuple[list[dict[str, Any]], list[Line]]:
    """Check and time whole models in v3-base geometry, eval, float32, patched against unpatched."""
    import torch

    records: list[dict[str, Any]] = []
    lines: list[Line] = []

    def line(length: int, **values: Any) -> None:
        title = "whole v3-base, eval, float32, times faster than unpatched"
        lines.append(Line("model", title, f"1x{length}", MODEL_LENGTHS[length], None, True, "x", **values))

    try:
        plain, patched = models(plan.backend)
    except Exception as error:  # no transformers, or nothing to patch with: the other figures still count
        for length in MODEL_LENGTHS:
            line(length, reason=f"not available: {type(error).__name__}: {error}")
        return records, lines
    bound: float | None = None
    for length in MODEL_LENGTHS:
        if plan.quick and length > 128:
            line(length, reason="not in --quick")
            continue
        check, suggested = check_models(plain, patched, length, bound if length > 512 else None)
        bound = max(bound or 0.0, suggested)
        record: dict[str, Any] = {
            "model": "v3-base",
            "batch": 1,
            "length": length,
            "checks": {"patched": check.as_json()},
        }
        records.append(record)
        if not check.ok:
            plan.note(f"model 1x{length}: RED, not timed\n{check.text}")
            line(length, reason="RED: " + check.text)
            continue
        generator = torch.Generator().manual_seed(length)
        ids = [torch.randint(1, 1024, (1, length), generator=generator) for _ in range(4)]
        mask = torch.ones_like(ids[0])
        calls = {name: _forward(model, ids, mask) for name, model in (("patched", patched), ("unpatched", plain))}
        pace = replace(plan.pace, rounds=15, least=3, seconds=3.0 if plan.quick else 20.0)
        samples = interleave(calls, pace)
        record["samples"] = {name: s.as_json() for name, s in samples.items()}
        ours, other = (plan.pick(record["samples"][name]) for name in ("patched", "unpatched"))
        plan.note(f"model 1x{length}: patched {ours[0] * 1e3:.1f} ms, unpatched {other[0] * 1e3:.1f} ms")
        line(length, median=other[0] / ours[0], best=other[1] / ours[1])
    return records, lines


def _forward(model: Any, ids: list[Any], mask: Any) -> Callable[[int], object]:
    import torch

    def run(index: int) -> object:
        with torch.no_grad():
            return model(input_ids=ids[index % len(ids)], attention_mask=mask)[0]

    return run


def measure_memory(plan: Plan) -> tuple[list[dict[str, Any]], list[Line]]:
    """Measure the extra memory of one call at two lengths, and that it grows no faster than the length."""
    largest, top_backward = (4096, 2048) if plan.quick else (16384, 4096)
    runs = [("float32", False, largest)]
    if not plan.quick:
        runs += [("bfloat16", False, largest), ("float32", True, top_backward)]
    records: list[dict[str, Any]] = []
    lines: list[Line] = []
    for dtype, backward, length in runs:
        direction = "forward + backward" if backward else "forward"
        found = {}
        for n in (length // 2, length):
            found[n] = extra_bytes(n, dtype, plan.backend, plan.threads, backward=backward)
            records.append({"dtype": dtype, "length": n, "backward": backward, **found[n]})
            plan.note(f"memory {n} {dtype} {direction}: {found[n]}")
        main = dtype == "float32" and not backward and not plan.quick
        must, aim = (MEMORY_MUST, MEMORY_AIM) if main else (None, None)
        title, case = f"extra memory of one layer, {direction}", f"1x{length} {dtype}"
        growth = "the same, twice the length over the length (N^2 would be 4)"
        failed = [x["error"] for x in found.values() if "error" in x]
        if failed:
            values: list[dict[str, Any]] = [{"reason": f"not available: {failed[0]}"}] * 2
        else:
            small, large = found[length // 2]["bytes"], found[length]["bytes"]
            grown = max(large - MEMORY_NOISE, 0) / max(small, MEMORY_NOISE)
            values = [{"median": x, "best": x} for x in (max(large, 0) / MEGABYTE, grown)]
        lines.append(Line("memory", title, case, must, aim, False, "MB", **values[0]))
        lines.append(Line("memory", growth, case, GROWTH_MUST, None, False, "", **values[1]))
    return records, lines
