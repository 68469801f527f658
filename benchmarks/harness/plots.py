"""Pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.candidates import CANDIDATES, EAGER, OURS, PLAIN
from benchmarks.harness.tables import conditions

__all__ = ["PICTURES", "draw_core", "draw_model"]


def _picture(panels: int, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10.5, height), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    return picture, picture.subplots(1, panels, squeeze=False)[0]


def _save(picture: Any, caption: str, path: Path) -> None:
    """Write a picture, its caption broken in two at a semicolon near the middle."""
    for panel in picture.axes:
        panel.spines[["top", "right"]].set_visible(False)
    half = caption.find("; ", len(caption) // 2)
    picture.supxlabel(caption if half < 0 else f"{caption[: half + 1]}\n{caption[half + 2 :]}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)


def _ratio(record: dict[str, Any], other: str, ours: str) -> float:
    samples = record["samples"]
    return float(samples[other]["median"] / samples[ours if ours in samples else "bare"]["median"])


def draw_core(result: dict[str, Any], path: Path) -> None:
    """Draw how much faster than eager, and the time relative to SDPA, which computes no position terms."""
    picture, (left, right) = _picture(2, 4.2)
    bars = []
    for record in result.get("core", []):
        if {"huggingface", "bare"} <= set(record["samples"]):
            dtype = "" if record["dtype"] == "float32" else f" {record['dtype']}"
            label = f"{record['label']}{' fwd + bwd' if record['backward'] else ''}{dtype}"
            bars.append((label, _ratio(record, "huggingface", "bare" if record["backward"] else "prepared")))
    whole = [r for r in result.get("models", []) if "samples" in r]
    bars += [(f"1x{r['length']} whole model", _ratio(r, "unpatched", "patched")) for r in whole]
    bars.reverse()
    drawn = left.barh([name for name, _ in bars], [value for _, value in bars], color=OURS)
    left.bar_label(drawn, [f"{value:.1f}x" for _, value in bars], padding=3, fontsize=8)
    left.axvline(1.0, color=EAGER, linewidth=1)
    left.margins(x=0.12)
    left.set_title("times faster than Hugging Face eager, float32 if not said", fontsize=10)
    plain = [r for r in result.get("core", []) if {"sdpa", "prepared"} <= set(r["samples"])]
    labels = list(dict.fromkeys(r["label"] for r in plain))
    for offset, (dtype, colour) in ((-0.2, ("float32", OURS)), (0.2, ("bfloat16", PLAIN))):
        found = {r["label"]: _ratio(r, "prepared", "sdpa") for r in plain if r["dtype"] == dtype}
        places = [labels.index(name) + offset for name in found]
        drawn = right.bar(places, list(found.values()), 0.38, color=colour, label=dtype)
        right.bar_label(drawn, [f"{value:.2f}" for value in found.values()], padding=2, fontsize=8)
    right.axhline(1.0, color=EAGER, linewidth=1, label="SDPA, which has no position terms")
    right.set_xticks(range(len(labels)), labels)
    right.set_title("forward time / SDPA without bias, same dtype", fontsize=10)
    right.margins(y=0.25)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    _save(picture, conditions(result), path)


def draw_model(result: dict[str, Any], path: Path) -> None:
    """Draw how much faster than eager each candidate is, one panel for each dtype."""
    coloured = {name: x for name, x in CANDIDATES["model"].items() if x.colour}
    dtypes = list(dict.fromkeys(record["dtype"] for record in result["models"]))
    picture, panels = _picture(len(dtypes), 4.4)
    for panel, dtype in zip(panels, dtypes, strict=True):
        records = [record for record in result["models"] if record["dtype"] == dtype]
        records.sort(key=lambda record: record["fill"] < 1.0)
        names = [name for name in coloured if any(name in record["samples"] for record in records)]
        for place, name in enumerate(names):
            found = [(i, r["samples"]) for i, r in enumerate(records) if name in r["samples"]]
            heights = [x["eager"]["median"] / x[name]["median"] for _, x in found]
            middles = [i + 0.8 * ((place + 0.5) / len(names) - 0.5) for i, _ in found]
            label = coloured[name].heading + (" (no position terms)" if name == "bert" else "")
            bars = panel.bar(middles, heights, 0.76 / len(names), color=coloured[name].colour, label=label)
            panel.bar_label(bars, [f"{x:.1f}" for x in heights], padding=2, fontsize=6)
        panel.axhline(1.0, color=EAGER, linewidth=1, label="Hugging Face eager")
        panel.set_xticks(range(len(records)), [r["label"].replace(" ", "\n", 1) for r in records], fontsize=8)
        panel.set_title(f"whole model, times faster than eager, {dtype}", fontsize=10)
        panel.margins(y=0.3)
        panel.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
    _save(picture, f"{result['settings']['model']}; {conditions(result)}", path)


# Kind in a file: how its picture is drawn.
PICTURES = {"cpu": draw_core, "model": draw_model}
