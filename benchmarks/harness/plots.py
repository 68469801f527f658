"""Pictures of results: each has a title that says what to see, and names the result it was drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.candidates import CANDIDATES, EAGER, OURS, OURS_LIGHT
from benchmarks.harness import tables, throughput
from benchmarks.harness.process import file_name

__all__ = ["PICTURES", "draw_core", "draw_model", "draw_texts"]

# In a README 830 pixels wide, 10 points are 13 pixels.
WIDTH, SMALL, MEDIUM, LARGE = 9.0, 9, 10.5, 13


def _picture(panels: int, height: float, **settings: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(WIDTH, height), dpi=180, layout="constrained")
    FigureCanvasAgg(picture)
    return picture, picture.subplots(1, panels, squeeze=False, **settings)[0]


def _save(picture: Any, title: str, result: dict[str, Any], path: Path) -> None:
    """Write a picture with its title, its conditions and the name of its result."""
    for panel in picture.axes:
        panel.spines[["top", "right"]].set_visible(False)
    picture.suptitle(title, fontsize=LARGE, fontweight="bold")
    picture.supxlabel(_conditions(result), fontsize=SMALL - 1.5, color="#475569")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, metadata={"Source": file_name(tables.kind_of(result), result)})


def _conditions(result: dict[str, Any]) -> str:
    """Return where a result was measured, in two short lines."""
    versions, settings = result["versions"], result["settings"]
    first = [settings.get("model", "12 heads of 64"), tables.cores(result), settings["clock"]]
    commit = (result["commit"]["id"] or "unknown")[:8]
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"{', '.join(first)}\n{packages}, commit {commit}, {result['date'][:10]}"


def _ratio(record: dict[str, Any], other: str, ours: str) -> float:
    samples = record["samples"]
    return float(samples[other]["median"] / samples[ours if ours in samples else "bare"]["median"])


def draw_texts(result: dict[str, Any], path: Path) -> None:
    """Draw tokens per second of everything a user may run, one panel for each kind of batches."""
    records, threads = result["texts"], result["settings"]["threads"]
    names = [name for name, x in CANDIDATES["texts"].items() if x.colour]
    picture, panels = _picture(len(records), 4.4, sharey=True)
    for panel, record in zip(panels, records, strict=True):
        for place, name in enumerate(names):
            if name not in record["samples"]:
                word = "not installed" if name in record["missing"] else "wrong answers"
                panel.text(0, place, f"  {word}", va="center", fontsize=SMALL)
                continue
            speed, ours = throughput.rate(record, name, threads), name in throughput.OURS
            panel.barh(place, speed, 0.74, color=CANDIDATES["texts"][name].colour)
            times = throughput.times_eager(record, name, threads)
            label = panel.annotate(
                "1x" if name == "eager" else _times(times),
                (speed, place),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
            label.set(fontsize=MEDIUM, fontweight="bold" if ours else "normal")
        panel.margins(x=0.2, y=0.02)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.tick_params(axis="x", labelsize=SMALL)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel("tokens per second, padding not counted", fontsize=SMALL)
        panel.set_title(record["title"], fontsize=MEDIUM)
    panels[0].set_yticks(range(len(names)), [CANDIDATES["texts"][name].heading for name in names], fontsize=MEDIUM)
    for name, tick in zip(names, panels[0].get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if name in throughput.OURS else "normal")
    panels[0].invert_yaxis()
    ours = [(record, name) for record in records for name in throughput.OURS if name in record["samples"]]
    ratios = [throughput.times_eager(record, name, threads) for record, name in ours]
    _save(picture, f"Real texts{_spread(ratios)}", result, path)


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x"


def _spread(ratios: list[float]) -> str:
    """Say how much faster than eager ours is, from the least to the most."""
    least, most = (_times(value).removesuffix("x").removesuffix(".0") for value in (min(ratios), max(ratios)))
    return f": patched is {least} to {most} times as fast as eager"


def draw_core(result: dict[str, Any], path: Path) -> None:
    """Draw how much faster than eager, and the time relative to SDPA, which computes no position terms."""
    picture, (left, right) = _picture(2, 4.6)
    bars = []
    for record in result.get("core", []):
        if {"huggingface", "bare"} <= set(record["samples"]):
            dtype = "" if record["dtype"] == "float32" else f", {record['dtype']}"
            label = f"{record['label']}{', gradients' if record['backward'] else ''}{dtype}"
            bars.append((label, _ratio(record, "huggingface", "bare" if record["backward"] else "prepared")))
    bars.reverse()
    drawn = left.barh([name for name, _ in bars], [value for _, value in bars], color=OURS)
    left.bar_label(drawn, [f"{value:.1f}x" for _, value in bars], padding=3, fontsize=SMALL)
    left.axvline(1.0, color=EAGER, linewidth=1.5)
    left.margins(x=0.14)
    left.set_title("times as fast as Hugging Face eager (line)", fontsize=MEDIUM)
    plain = [r for r in result.get("core", []) if {"sdpa", "prepared"} <= set(r["samples"])]
    labels = list(dict.fromkeys(r["label"] for r in plain))
    for offset, (dtype, colour) in ((-0.2, ("float32", OURS)), (0.2, ("bfloat16", OURS_LIGHT))):
        found = {r["label"]: _ratio(r, "prepared", "sdpa") for r in plain if r["dtype"] == dtype}
        places = [labels.index(name) + offset for name in found]
        drawn = right.bar(places, list(found.values()), 0.38, color=colour, label=dtype)
        right.bar_label(drawn, [f"{value:.2f}" for value in found.values()], padding=2, fontsize=SMALL - 1)
    right.axhline(1.0, color=EAGER, linewidth=1.5, label="SDPA, same dtype")
    right.set_xticks(range(len(labels)), labels)
    right.set_title("time / SDPA's, which has no positions", fontsize=MEDIUM)
    right.margins(y=0.25)
    right.legend(frameon=False, fontsize=SMALL, loc="upper right")
    for panel in (left, right):
        panel.tick_params(labelsize=SMALL)
    values = [value for _, value in bars]
    _save(picture, f"Attention alone{_spread(values)}".replace("patched", "fused"), result, path)


def draw_model(result: dict[str, Any], path: Path) -> None:
    """Draw how much faster than eager each candidate is, one panel for each dtype, one below the other."""
    coloured = {name: x for name, x in CANDIDATES["model"].items() if x.colour}
    dtypes = list(dict.fromkeys(record["dtype"] for record in result["models"]))
    picture, _ = _picture(1, 2.9 * len(dtypes) + 0.6)
    picture.clear()
    panels = picture.subplots(len(dtypes), 1, squeeze=False)[:, 0]
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
            panel.bar_label(bars, [f"{x:.1f}" for x in heights], padding=2, fontsize=SMALL - 1)
            for i, r in enumerate(records):
                if not r["checks"].get(name, {"ok": True})["ok"]:
                    middle = i + 0.8 * ((place + 0.5) / len(names) - 0.5)
                    panel.text(middle, 0.05, "wrong", rotation=90, ha="center", va="bottom", fontsize=SMALL)
        panel.axhline(1.0, color=EAGER, linewidth=1.5, label="Hugging Face eager")
        panel.set_xticks(range(len(records)), [r["label"] for r in records])
        panel.tick_params(labelsize=SMALL)
        panel.set_title(f"times as fast as eager, {dtype}", fontsize=MEDIUM)
        panel.margins(y=0.2)
        panel.legend(frameon=False, fontsize=SMALL, loc="upper left", ncols=2)
    timed = [r["samples"] for r in result["models"] if {"eager", "patched"} <= set(r["samples"])]
    ratios = [x["eager"]["median"] / x["patched"]["median"] for x in timed]
    _save(picture, f"Whole models, batch x length{_spread(ratios)}", result, path)


# Kind in a file: how its picture is drawn.
PICTURES = {"cpu": draw_core, "model": draw_model, "texts": draw_texts}
