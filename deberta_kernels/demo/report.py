"""The demo's measurements shown: a table, a picture, and the numbers as JSON and CSV."""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deberta_kernels import dtypes
from deberta_kernels.info import info

from .tables import aligned

__all__ = ["Row", "conditions", "draw", "format_table", "write_numbers"]

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
        "processor": found["cpu"]["model"],
        "instruction_set": found["library"]["isa"],
        "python": platform.python_version(),
        "torch": found["packages"]["torch"],
        "transformers": found["packages"]["transformers"],
        "deberta_kernels": found["version"],
    }


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _megabytes(count: int | None) -> str:
    return "n/a" if count is None else f"{count / MEGABYTE:.0f}"


def format_table(rows: list[Row]) -> str:
    """Return the measurements as an aligned text table."""
    head = ["input", "time before", "after", "speed-up", "memory before", "after", "difference", "backend"]
    units = ["", "ms", "ms", "", "MB", "MB", "largest", ""]
    lines = [head, units]
    for row in rows:
        times = [_milliseconds(row.seconds_before), _milliseconds(row.seconds_after), f"{row.speed_up:.2f}x"]
        memory = [_megabytes(row.bytes_before), _megabytes(row.bytes_after)]
        lines.append([row.label, *times, *memory, f"{row.difference:.1e}", row.backend])
    return aligned(lines, left=(0, len(head) - 1), heads=2)


def write_numbers(folder: Path, name: str, about: dict[str, Any], rows: list[Row]) -> list[Path]:
    """Write name.json (conditions and rows) and name.csv (rows); return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{**asdict(row), "speed_up": row.speed_up} for row in rows]
    as_json, as_csv = folder / f"{name}.json", folder / f"{name}.csv"
    as_json.write_text(json.dumps({"conditions": about, "rows": records}, indent=1) + "\n", encoding="utf-8")
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return [as_json, as_csv]


def draw(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """Draw time and memory over length, for the rows with one sequence.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows = sorted((row for row in rows if row.batch == 1), key=lambda row: row.tokens)
    lengths = [row.tokens for row in rows]
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    curves = (
        ("time of one forward pass, ms", 1e3, "seconds_before", "seconds_after"),
        ("peak memory above the model, MB", 1 / MEGABYTE, "bytes_before", "bytes_after"),
    )
    for panel, (title, unit, before, after) in zip(panels, curves):
        for name, label, colour, marker in (
            (before, "Hugging Face", "#b45309", "s"),
            (after, "patched", "#0f766e", "o"),
        ):
            points = [(n, getattr(row, name) * unit) for n, row in zip(lengths, rows) if getattr(row, name) is not None]
            panel.plot(*zip(*points), marker=marker, color=colour, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panel.minorticks_off()
        panel.set_xlabel("tokens")
        panel.set_title(title, fontsize=10)
        panel.grid(True, alpha=0.3)
        panel.legend(frameon=False)
    figure.suptitle(
        f"{about['model']}, {about['dtype']}, 1 sequence, {about['threads']} thread(s)\n"
        f"{about['processor']}; torch {about['torch']}, transformers {about['transformers']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
