"""Turn a result of bench_model.py into tables of times and memory, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import EAGER, OURS, PLAIN, conditions, figures_markdown, table, wrapped

__all__ = ["draw", "markdown", "text", "times"]

COLUMNS = {
    "eager": "eager",
    "patched": "patched",
    "padded": "unpad=False",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "bert": "BERT, SDPA",
}
COLOURS = {"patched": OURS, "onnxruntime": "#2563eb", "openvino": "#7c3aed", "bert": PLAIN}


def _time(record: dict[str, Any], name: str) -> str:
    if name in record["samples"]:
        return f"{record['samples'][name]['median'] * 1e3:.0f}"
    if not record["checks"].get(name, {"ok": True})["ok"]:
        return "wrong"
    return "missing" if name in record["missing"] else ""


def _megabytes(record: dict[str, Any], name: str) -> str:
    value = record["bytes"].get(name)
    return "" if value is None else "failed" if isinstance(value, str) else f"{value / 1e6:.0f}"


def times(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return (title, rows with a head) of the medians in ms and of the peak extra memory in MB."""
    tables = []
    for title, key, cell in (
        ("forward, ms", "models", _time),
        ("peak memory above the loaded model, MB", "peaks", _megabytes),
    ):
        records = result.get(key, [])
        if not records:
            continue
        rows = [[title, *COLUMNS.values()]]
        for record in sorted(records, key=lambda r: (r["dtype"] != "float32", r["fill"] < 1.0)):
            rows.append([f"{record['label']} {record['dtype']}", *(cell(record, name) for name in COLUMNS)])
        tables.append((title, rows))
    return tables


def text(result: dict[str, Any]) -> str:
    """Return times, memory and figures as aligned text."""
    parts = []
    for _, rows in times(result):
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
        ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, table(result)])


def markdown(result: dict[str, Any]) -> str:
    """Return times, memory, figures and conditions as markdown."""
    lines: list[str] = []
    for _, rows in times(result):
        lines += ["| " + " | ".join(rows[0]) + " |", "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
        lines.append("")
    return "\n".join(
        [*lines, *figures_markdown(result), "", f"{result['settings']['model']}; medians. {conditions(result)}."]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw how much faster than eager each candidate is, one panel for each dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(record["dtype"] for record in result["models"]))
    picture = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    for panel, dtype in zip(picture.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        records = [record for record in result["models"] if record["dtype"] == dtype]
        records.sort(key=lambda record: record["fill"] < 1.0)
        names = [name for name in COLOURS if any(name in record["samples"] for record in records)]
        for place, name in enumerate(names):
            found = [(i, r["samples"]) for i, r in enumerate(records) if name in r["samples"]]
            heights = [x["eager"]["median"] / x[name]["median"] for _, x in found]
            middles = [i + 0.8 * ((place + 0.5) / len(names) - 0.5) for i, _ in found]
            label = COLUMNS[name] + (" (no position terms)" if name == "bert" else "")
            bars = panel.bar(middles, heights, 0.76 / len(names), color=COLOURS[name], label=label)
            panel.bar_label(bars, [f"{x:.1f}" for x in heights], padding=2, fontsize=6)
        panel.axhline(1.0, color=EAGER, linewidth=1, label="Hugging Face eager")
        panel.set_xticks(range(len(records)), [r["label"].replace(" ", "\n", 1) for r in records], fontsize=8)
        panel.set_title(f"whole model, times faster than eager, {dtype}", fontsize=10)
        panel.margins(y=0.3)
        panel.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
        panel.spines[["top", "right"]].set_visible(False)
    picture.supxlabel(wrapped(f"{result['settings']['model']}; {conditions(result)}"), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
