"""What was measured, shown: a table, a picture, and the numbers as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deberta_kernels.bench.agreement import Agreement
from deberta_kernels.bench.batches import Batches
from deberta_kernels.bench.compare import Measured
from deberta_kernels.demo.picture import PATCHED, STOCK, Bar, Panel, figure_of, gain
from deberta_kernels.demo.report import MEGABYTE, described, megabytes, milliseconds
from deberta_kernels.demo.tables import aligned

__all__ = ["as_records", "draw", "format_table", "lines_of_dtypes"]

# Of each column: its name, and its unit below.
COLUMNS = {
    "model": "", "texts/s": "", "tokens/s": "", "speed-up": "by clock", "speed-up ": "CPU time", "batch": "median, ms",
    "batch ": "p95, ms", "CPU": "median, ms", "memory": "MB", "difference": "largest", "labels": "changed",
}  # fmt: skip


def high_percentile(values: Sequence[float]) -> float:
    """Return the 95th percentile: at most one value in twenty is larger."""
    ordered = sorted(values)
    return ordered[-1 - len(ordered) // 20]


def as_records(measured: Sequence[Measured], batches: Batches) -> list[dict[str, Any]]:
    """Return a record for each model, with what follows from its times."""
    first = sum(measured[0].wall)
    return [
        {
            "model": one.name,
            "texts_per_second": batches.texts / sum(one.wall),
            "tokens_per_second": batches.tokens / sum(one.wall),
            "speed_up": first / sum(one.wall),
            "speed_up_of_cpu_time": sum(measured[0].cpu) / sum(one.cpu),
            "median_seconds": statistics.median(one.wall),
            "p95_seconds": high_percentile(one.wall),
            "median_cpu_seconds": statistics.median(one.cpu),
            **asdict(one),
        }
        for one in measured
    ]


def format_table(measured: Sequence[Measured], batches: Batches) -> str:
    """Return an aligned text table, a line for each model; everything is compared with the first one."""
    lines = [[name.strip() for name in COLUMNS], [*COLUMNS.values()]]
    for number, (one, record) in enumerate(zip(measured, as_records(measured, batches))):
        lines.append(
            [
                one.name,
                _rate(record["texts_per_second"]),
                _rate(record["tokens_per_second"]),
                f"{record['speed_up']:.2f}x",
                f"{record['speed_up_of_cpu_time']:.2f}x",
                *(milliseconds(record[name]) for name in ("median_seconds", "p95_seconds", "median_cpu_seconds")),
                megabytes(one.bytes),
                f"{one.first.difference:.1e}" if number else "-",
                _changed(one.first) if number else "-",
            ]
        )
    return aligned(lines, heads=2)


def lines_of_dtypes(measured: Sequence[Measured]) -> list[str]:
    """Return a line for each further dtype: patched against the stock model of the same dtype."""
    times = {one.name: sum(one.wall) for one in measured}
    return [
        f"{one.name} against stock {one.dtype}: {times[f'stock {one.dtype}'] / times[one.name]:.2f}x, "
        f"largest difference {one.stock.difference:.1e}, labels changed {_changed(one.stock)}"
        for one in measured
        if one.patched and one.dtype != measured[0].dtype
    ]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _changed(agreement: Agreement) -> str:
    return "-" if agreement.changed is None else f"{agreement.changed} of {agreement.labels}"


def draw(about: dict[str, Any], measured: Sequence[Measured], batches: Batches) -> Any:
    """Draw tokens per second and peak memory of each model; return the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    records = as_records(measured, batches)
    speed, memory = {}, {}
    for one, record in zip(measured, records):
        colour, rate = PATCHED if one.patched else STOCK, record["tokens_per_second"]
        written = gain(rate, records[0]["tokens_per_second"]) if one is not measured[0] else ""
        speed[one.name] = [Bar(rate, colour, written)]
        less = gain(measured[0].bytes, one.bytes, "less") if one.patched else ""
        memory[one.name] = [Bar(one.bytes / MEGABYTE, colour, less)]
    panels = [
        Panel("tokens per second", speed, logarithmic=False),
        Panel("peak memory of the largest batch above the model, MB", memory, logarithmic=False),
    ]
    title = f"{about['model']}: {records[1]['speed_up']:.1f} times the tokens per second when patched"
    return figure_of(title, f"{about['texts']}\n{described(about)}", panels, legend=False)
