"""What a kind of measurement would measure: its shapes, candidates and figures, as the registry has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from benchmarks import registry
from benchmarks.harness.figures import Figure
from benchmarks.harness.tables import aligned, bound

__all__ = ["listing"]

FIGURES: dict[str, tuple[Figure, ...]] = {
    "core": (*registry.CORE_FIGURES, *registry.CORE_MODEL_FIGURES),
    "model": registry.MODEL_FIGURES,
    "tensorflow": registry.TENSORFLOW_FIGURES,
    "train": registry.TRAIN_FIGURES,
    "linear": registry.LINEAR_FIGURES,
    "adapters": tuple(dict.fromkeys(workload.figure for x in registry.ADAPTERS.values() for workload in x)),
    "gpu": registry.GPU_FIGURES,
}


def _shapes(name: str) -> Iterable[str]:
    figures = FIGURES.get(name, ())
    if name == "memory":
        return [f"{x.title}: {x.batch}x{x.length} {x.dtype}" for x in registry.LARGE.values()]
    if name == "adapters":
        return [f"{figure.title}: {figure.shape.label}" for figure in figures]
    if name == "texts":
        return [texts.label for texts in registry.TEXTS]
    if name == "gpu":
        return [f"{16384 // n}x{n}, forward, and forward + backward" for n in registry.GPU_LENGTHS]
    shapes = registry.MODEL_SHAPES if name == "model" else [figure.shape for figure in figures]
    return dict.fromkeys(f"{x.label} {x.dtype}" + (" forward + backward" if x.backward else "") for x in shapes)


def listing(name: str) -> str:
    """Return the shapes, candidates and figures of a kind."""
    parts = []
    if shapes := list(_shapes(name)):
        parts.append("\n".join(["shapes", *(f"  {shape}" for shape in shapes)]))
    rows = [["candidate", "heading", "needs", "dtypes"]]
    for candidate, row in registry.CANDIDATES.get(name, {}).items():
        needs = ", ".join(row.needs) + (f" {row.release}" if row.release else "")
        rows.append([candidate, row.heading, needs, ", ".join(row.dtypes) or "all"])
    if len(rows) > 1:
        parts.append(aligned(rows, left=range(4), heads=1))
    rows = [["figure", "case", "must", "aim"]]
    for figure in FIGURES.get(name, ()):
        line: dict[str, Any] = asdict(figure.line())
        title = "" if any(figure.title == row[0] for row in rows) else figure.title
        rows.append([title, line["case"], bound(line, "must"), bound(line, "aim")])
    if len(rows) > 1:
        parts.append(aligned(rows, left=(0, 1), heads=1))
    return "\n\n".join(parts) or f"{name} has no shapes or figures of its own; its options say what it does (--help)"
