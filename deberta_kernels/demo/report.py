"""The demo's measurements shown: a table, a picture, and the numbers as JSON and CSV."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deberta_kernels import dtypes
from deberta_kernels.info import info
from deberta_kernels.native import processor

from . import results
from .picture import PATCHED, STOCK, Bar, Panel, figure_of, gain
from .tables import aligned

__all__ = [
    "MEGABYTE",
    "Row",
    "conditions",
    "described",
    "draw",
    "format_table",
    "megabytes",
    "milliseconds",
    "write_numbers",
]

MEGABYTE = 1e6


@dataclass(frozen=True)
class Row:
    """The measurements of one input.

    Attributes:
        label: input as the table names it.
        batch: number of sequences.
        tokens: padded length N.
        seconds_before: median time of one forward pass of the model as it was.
        seconds_after: the same, patched.
        cpu_before: median time of the processor in one forward pass, all threads together, as it was.
        cpu_after: the same, patched.
        bytes_before: peak memory of one forward pass above the loaded model, as it was; None = not measured.
        bytes_after: the same, patched.
        difference: largest |before - after| of the last hidden state over real tokens.
        scale: largest |last hidden state|, to compare the difference with.
        backend: what computed the attention of the patched model.
    """

    label: str
    batch: int
    tokens: int
    seconds_before: float
    seconds_after: float
    cpu_before: float
    cpu_after: float
    bytes_before: int | None
    bytes_after: int | None
    difference: float
    scale: float
    backend: str

    @property
    def speed_up(self) -> float:
        """Return time before over time after."""
        return self.seconds_before / self.seconds_after


def conditions(model: str, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Return what a reader needs to judge the numbers."""
    found = info()
    return {
        "model": model,
        "dtype": dtypes.name(dtype),
        "threads": threads,
        "processor": processor.everyday_name(),
        "instruction_set": found["library"]["isa"],
        "python": platform.python_version(),
        "torch": found["packages"]["torch"],
        "transformers": found["packages"]["transformers"],
        "deberta_kernels": found["version"],
    }


def milliseconds(seconds: float) -> str:
    """Return a time as it stands in a table, in ms."""
    value = seconds * 1e3
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def megabytes(count: int | None) -> str:
    """Return a number of bytes as it stands in a table, in MB."""
    return "n/a" if count is None else f"{count / MEGABYTE:.0f}"


def format_table(rows: list[Row]) -> str:
    """Return the measurements as an aligned text table."""
    head = ["input", "time before", "after", "speed-up", "memory before", "after", "difference", "backend"]
    units = ["", "ms", "ms", "", "MB", "MB", "largest", ""]
    lines = [head, units]
    for row in rows:
        times = [milliseconds(row.seconds_before), milliseconds(row.seconds_after), f"{row.speed_up:.2f}x"]
        memory = [megabytes(row.bytes_before), megabytes(row.bytes_after)]
        lines.append([row.label, *times, *memory, f"{row.difference:.1e}", row.backend])
    return aligned(lines, left=(0, len(head) - 1), heads=2)


def write_numbers(folder: Path, name: str, about: dict[str, Any], rows: list[Row]) -> list[Path]:
    """Write name.json (conditions and rows) and name.csv (rows); return both paths."""
    records = [{**asdict(row), "speed_up": row.speed_up} for row in rows]
    as_json = results.write_json(folder / f"{name}.json", {"conditions": about, "rows": records})
    return [as_json, results.write_csv(folder / f"{name}.csv", records)]


def title(rows: list[Row]) -> str:
    """Return what to see in the rows."""
    least, most = min(row.speed_up for row in rows), max(row.speed_up for row in rows)
    times = f"{least:.1f}" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f}"
    return f"A patched DeBERTa is {times} times as fast"


def described(about: dict[str, Any]) -> str:
    """Return the conditions as they stand under the title of a picture."""
    where = processor.with_cores(about["processor"], about["threads"])
    return f"{about['model']}, {about['dtype']}; {where}; torch {about['torch']}, transformers {about['transformers']}"


def draw(about: dict[str, Any], rows: list[Row]) -> Any:
    """Draw time and memory of every row, before and after, with what was gained in the bars; return the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    quantities = (
        ("time of one forward pass, ms", 1e3, "seconds_before", "seconds_after", "faster"),
        ("peak memory above the model, MB", 1 / MEGABYTE, "bytes_before", "bytes_after", "less"),
    )
    panels = []
    for name, unit, before, after, word in quantities:
        groups = {}
        for row in rows:
            first, second = getattr(row, before), getattr(row, after)
            bars = (Bar(_times(first, unit), STOCK), Bar(_times(second, unit), PATCHED, gain(first, second, word)))
            groups[row.label] = bars
        panels.append(Panel(name, groups))
    return figure_of(title(rows), f"{described(about)}; inputs are texts x tokens", panels)


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
