"""Figures: two times compared, or one with the peak, and the one judge that holds them to their bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Figure", "Line", "Pick", "judge"]

# Samples of a candidate -> median and minimum that count, in seconds.
Pick = Callable[[dict[str, Any]], tuple[float, float]]
UNITS = {"time": "", "speed": "x", "fraction": "", "share": "%", "memory": " MB"}


@dataclass(frozen=True)
class Figure:
    """One figure: what is compared where, and its bar.

    Attributes:
        group: name for `--only`.
        title: what is compared with what.
        shape: where, an entry of the registry.
        ours: candidate of ours.
        others: candidates compared with, the fastest of them; () for a share of the peak.
        must: bound that has to hold; None for a figure that is only shown.
        aim: bound worth reaching, or None.
        sense: "time" (ours / other, lower is better), "speed" or "fraction" (other / ours, higher is better), "share"
            (needed FLOPs at the best rate of a product, over our time, in per cent, higher is better) or "memory".
        case: what the table says of the shape; its label if "".
        foreign: the others are packages of others, whose wrong answer is named and no fault of ours.
    """

    group: str
    title: str
    shape: Any
    ours: str
    others: tuple[str, ...]
    must: float | None
    aim: float | None
    sense: str
    case: str = ""
    foreign: bool = False

    def value(self, ours: float, other: float) -> float:
        """Turn two times, in the same unit, into the figure."""
        return ours / other if self.sense == "time" else other / ours

    def line(self, case: str = "", **values: Any) -> Line:
        """Return the figure with what was measured."""
        case = case or self.case or self.shape.label
        unit, higher = UNITS[self.sense], self.sense not in ("time", "memory")
        return Line(self.group, self.title, case, self.must, self.aim, higher, unit, **values)


@dataclass(frozen=True)
class Line:
    """One line of the table of figures.

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
        at_peak: what `best` would be if ours did its needed FLOPs at the best rate of a product, or None: a bound
            beyond it is out of reach on this machine.
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
        if self.reason.startswith("RED"):
            return "RED"
        if self.reason or self.median is None:
            return "none"
        if self.must is None:
            return "info"
        for name, bound in (("aim", self.aim), ("must", self.must)):
            if self.reaches(bound, self.median) and self.reaches(bound, self.best):
                return name
        return "close" if self.reaches(self.must, self.median) or self.reaches(self.must, self.best) else "MISSED"

    def as_json(self) -> dict[str, Any]:
        """Return the fields and the verdict."""
        return {**self.__dict__, "verdict": self.verdict}


def judge(
    figure: Figure, record: dict[str, Any] | None, pick: Pick, shortest: float | None, skipped: str = "not in this run"
) -> Line:
    """Return what a record says of a figure.

    Args:
        figure: what is asked.
        record: of the figure's shape: "samples" by candidate, "checks" by candidate with "ok", and where there are any
            "missing" by candidate, or one "reason" for all. None: the shape was not measured.
        pick: samples of a candidate -> median and minimum.
        shortest: seconds that our needed FLOPs take at the best rate of a product seen in this run, or None.
        skipped: reason of a shape that was not measured.
    """
    if record is None or "reason" in record:
        return figure.line(reason=skipped if record is None else record["reason"])
    answered_for = (figure.ours,) if figure.foreign else (figure.ours, *figure.others)
    for name in answered_for:
        if not _right(record, name):
            return figure.line(
                reason=f"RED: {name} is over the error budget or failed: {record['checks'][name]['text']}"
            )
    names = (figure.ours, *figure.others)
    times = {name: pick(record["samples"][name]) for name in names if name in record["samples"]}
    if figure.ours not in times or (figure.others and len(times) == 1):
        return figure.line(reason="; ".join(_why(record, name) for name in names if name not in times))
    ours = times.pop(figure.ours)
    # Something faster than the peak means that a busy machine lowered the peak: then it bounds nothing.
    credible = shortest is not None and shortest <= ours[1]
    if figure.sense == "share":
        if shortest is None or not credible:
            return figure.line(reason="not available: no rate is known" if shortest is None else _NOT_CREDIBLE)
        return figure.line(median=100 * shortest / ours[0], best=100 * shortest / ours[1])
    median, minimum = (min(time[index] for time in times.values()) for index in (0, 1))
    case = ""
    if len(figure.others) > 1:
        case = f"{figure.case or figure.shape.label}, {min(times, key=lambda name: times[name][0])}"
    at_peak = figure.value(shortest, minimum) if shortest is not None and credible else None
    return figure.line(case, median=figure.value(ours[0], median), best=figure.value(ours[1], minimum), at_peak=at_peak)


_NOT_CREDIBLE = "not credible: faster than the peak, which a busy machine lowered"


def _right(record: dict[str, Any], name: str) -> bool:
    return bool(record["checks"].get(name, {"ok": True})["ok"])


def _why(record: dict[str, Any], name: str) -> str:
    if name in record.get("missing", {}):
        return f"{name}: {record['missing'][name]}"
    return f"{name} is no candidate here" if _right(record, name) else f"{name} gave a wrong answer"
