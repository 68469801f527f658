"""Committed bounds of what is executed, beside those of what is compiled.

`tools/offline/executed_bounds.json` holds, per compiler, device, kernel and zone, the figures that were counted. A run
counts exactly, so a figure above its own is a regression; of instructions a compiler may make a few more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from offline import bounds as compiled

from counted.figures import Conflict

__all__ = ["BOUNDS", "Record", "judge", "load", "missing", "store", "update"]

BOUNDS = compiled.BOUNDS.with_name("executed_bounds.json")
# How much a figure may grow before it is a regression: factor and absolute slack.
_SLACK = {"instructions": (1.03, 4)}
# Figures that bank conflicts make larger.
_CONFLICTING = ("wavefronts", "conflicts")

# By compiler, by device, by kernel and zone, by figure.
Bounds = dict[str, dict[str, dict[str, dict[str, float]]]]


class Record(NamedTuple):
    """One zone of one kernel.

    Attributes:
        compiler: such as "triton 3.9".
        chip: such as "sm_90".
        name: the kernel with its variant.
        zone: of its tiles, or `zones.PROGRAM`.
        values, classes: see `figures.Figures`.
        conflicts: where banks conflict.
    """

    compiler: str
    chip: str
    name: str
    zone: str
    values: dict[str, float]
    classes: dict[str, float]
    conflicts: tuple[Conflict, ...]

    @property
    def title(self) -> str:
        """Return its name in the bounds of its compiler and device."""
        return f"{self.name}, {self.zone}"


def judge(record: Record, bounds: Bounds) -> list[str]:
    """Return what is wrong with a zone of a kernel, one clause each: figure, bound, and where banks conflict."""
    bound = bounds.get(record.compiler, {}).get(record.chip, {}).get(record.title)
    if bound is None:
        return ["no bound is committed for it; run with --update and look at what changes"]
    wrong = []
    for figure, value in record.values.items():
        factor, slack = _SLACK.get(figure, (1.0, 0))
        if value > (most := bound.get(figure, 0) * factor + slack):
            clause = f"{figure} {value:g} is over {most:g} (was {bound.get(figure, 0):g})"
            places = [f"{c.extra:g} by {c.opcode} at {c.place}" for c in record.conflicts]
            wrong.append(f"{clause}; conflicts: {', '.join(places)}" if places and figure in _CONFLICTING else clause)
    return wrong


def missing(records: list[Record], bounds: Bounds) -> list[str]:
    """Return the kernels and zones that have bounds and were not executed, of the compilers that were."""
    found = {(record.compiler, record.chip, record.title) for record in records}
    compilers = {record.compiler for record in records}
    known = {
        (compiler, chip, title)
        for compiler in compilers
        for chip, titles in bounds.get(compiler, {}).items()
        for title in titles
    }
    return [" ".join(place) for place in sorted(known - found)]


def update(bounds: Bounds, records: list[Record], *, complete: bool) -> None:
    """Take the figures of the records as bounds; with `complete` these are all there are of their compilers."""
    if complete:
        for record in records:
            bounds.pop(record.compiler, None)
    for record in records:
        titles = bounds.setdefault(record.compiler, {}).setdefault(record.chip, {})
        titles[record.title] = {name: int(x) if x == int(x) else x for name, x in record.values.items()}


def load(path: Path = BOUNDS) -> Bounds:
    """Return the committed bounds, empty where there are none."""
    found: dict[str, Any] = compiled.load(path)
    return found


def store(bounds: Bounds, path: Path = BOUNDS) -> None:
    """Write the bounds, one kernel and zone a line, so that a change reads as one."""
    compiled.store(bounds, path)
