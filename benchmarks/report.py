"""Turn a result into a table, a README section and a picture, so that no number is typed by hand.

    python -m benchmarks report                                newest result of bench_cpu.py, as markdown
    python -m benchmarks report RESULT.json --plot docs/images/cpu.png --update README.md
    python -m benchmarks report --kind model --plot docs/images/model.png

`--update` replaces what stands between the lines `<!-- bench-KIND:begin -->` and `<!-- bench-KIND:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS

__all__ = ["conditions", "figures_markdown", "kind_of", "markdown", "side_by_side", "table", "wrapped"]

SKIPPED = ("not in --quick", "not in this run")
# Colours: this package, the line of eager, what has no position terms.
OURS, EAGER, PLAIN = "#0f766e", "#b45309", "#64748b"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.0f} %"
    return f"{value:.1f}{unit}" if unit == "x" else f"{value:.0f} MB" if unit == "MB" else f"{value:.2f}"


def _bound(figure: dict[str, Any], name: str) -> str:
    sign = "≥" if figure["higher"] else "≤"
    return "" if figure[name] is None else f"{sign} {_number(figure[name], figure['unit'])}"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for figure in result["figures"]:
        if figure["reason"] in SKIPPED:
            continue
        values = [_number(figure[name], figure["unit"]) for name in ("median", "best")]
        values.append("" if figure["at_peak"] is None else _number(figure["at_peak"], figure["unit"]))
        verdict = figure["verdict"] + (f": {figure['reason']}" if figure["reason"] else "")
        if figure["verdict"] in ("MISSED", "close") and _out_of_reach(figure):
            verdict += ", out of reach on this machine"
        rows.append([figure["title"], figure["case"], _bound(figure, "must"), _bound(figure, "aim"), *values, verdict])
    return rows


def _out_of_reach(figure: dict[str, Any]) -> bool:
    if figure["at_peak"] is None:
        return False
    return bool(figure["at_peak"] < figure["must"] if figure["higher"] else figure["at_peak"] > figure["must"])


HEAD = ["figure", "case", "must", "aim", "medians", "minima", "at peak", "verdict"]


def table(result: dict[str, Any]) -> str:
    """Return every figure as aligned text under the conditions it was measured in."""
    rows = _rows(result)
    shown, previous = [], ""
    for row in rows:
        shown.append(["" if row[0] == previous else row[0], *row[1:]])
        previous = row[0]
    widths = [max(len(row[i]) for row in [HEAD, *shown]) for i in range(len(HEAD) - 1)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]) for row in [HEAD, *shown]]
    lines.insert(1, "-" * min(140, max(map(len, lines))))
    rates = ", ".join(f"{name} {'-' if x is None else f'{x:.0f}'}" for name, x in result["rates_gflops"].items())
    counts: dict[str, int] = {}
    for figure in result["figures"]:
        name = figure["reason"] if figure["reason"] in SKIPPED else figure["verdict"]
        counts[name] = counts.get(name, 0) + 1
    tally = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([conditions(result), f"GFLOP/s: {rates}", "", *lines, "", f"{tally}; {result['seconds']:.0f} s"])


def conditions(result: dict[str, Any]) -> str:
    """Return one paragraph that says where and how the numbers were measured."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    commit = (result["commit"]["id"] or "unknown")[:8] + (" with changes" if result["commit"]["modified"] else "")
    family = f" (family {machine['family']}, model {machine['model']})" if machine["family"] else ""
    return (
        f"{machine['processor']}{family}, {settings['threads']} thread(s), {settings['clock']}; "
        f"backend {settings['backend']}, instruction set {result['library']['isa'] or 'none'}; "
        f"torch {versions['torch']} ({versions['torch_isa']}), transformers {versions['transformers']}, "
        f"Python {versions['python']}; commit {commit}, {result['date'][:10]}; "
        f"load {machine['load_average'][0]} before, {result['load_average_after'][0]} after"
        + ("; the library is not made of these sources" if result["library"]["stale"] else "")
        + ("; quick" if settings["quick"] else "")
        + ("" if result.get("complete", True) else "; stopped before its last shapes")
    )


def markdown(result: dict[str, Any]) -> str:
    """Return the times in ms, the figures and the conditions as markdown, slower shapes included."""
    lines = ["| attention core | Hugging Face eager | SDPA without bias | this | this, prepared tables |"]
    lines += ["|---|---|---|---|---|"]
    for record in result.get("core", []):
        direction = "forward + backward" if record["backward"] else "forward"
        cells = [f"{record['label']} {record['dtype']} {direction}"]
        for name in ("huggingface", "sdpa", "bare", "prepared"):
            samples = record["samples"].get(name)
            red = not record["checks"].get(name, {"ok": True})["ok"]
            cells.append("red" if red else "" if samples is None else f"{samples['median'] * 1e3:.2f} ms")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *figures_markdown(result), "", f"Medians. {conditions(result)}."])


def figures_markdown(result: dict[str, Any]) -> list[str]:
    """Return the lines of a markdown table of every figure."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return lines + ["| " + " | ".join(row) + " |" for row in _rows(result)]


def kind_of(result: dict[str, Any]) -> str:
    """Return which benchmark wrote a result; the first ones did not say."""
    return str(result.get("kind", "cpu"))


def side_by_side(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures of several instruction sets in columns, medians."""
    if not results:
        return "no instruction set could be measured"
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for isa, result in results.items():
        for figure in result["figures"]:
            if figure["verdict"] == "none":
                continue
            red = figure["verdict"] == "RED"
            cell = "RED" if red else _number(figure["median"], figure["unit"])
            columns.setdefault((figure["title"], figure["case"]), {})[isa] = cell
    rows = [["figure", "case", *results]]
    rows += [[title, case, *(cells.get(isa, "-") for isa in results)] for (title, case), cells in columns.items()]
    rates = {isa: result["rates_gflops"] for isa, result in results.items()}
    for name in next(iter(rates.values())):
        values = [rates[isa].get(name) for isa in results]
        rows.append(["GFLOP/s", name, *("-" if value is None else f"{value:.0f}" for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _label(record: dict[str, Any]) -> str:
    dtype = "" if record["dtype"] == "float32" else f" {record['dtype']}"
    return f"{record['label']}{' fwd + bwd' if record['backward'] else ''}{dtype}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw how much faster than eager, and the time relative to SDPA, which computes no position terms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2)
    cores = [r for r in result.get("core", []) if {"huggingface", "bare"} <= set(r["samples"])]
    bars = [(_label(r), _ratio(r, "huggingface", "bare" if r["backward"] else "prepared")) for r in cores]
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
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    picture.supxlabel(wrapped(conditions(result)), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)


def _ratio(record: dict[str, Any], other: str, ours: str) -> float:
    samples = record["samples"]
    return float(samples[other]["median"] / samples[ours if ours in samples else "bare"]["median"])


def wrapped(text: str) -> str:
    """Break a line in two at a semicolon near its middle."""
    half = text.find("; ", len(text) // 2)
    return text if half < 0 else f"{text[: half + 1]}\n{text[half + 2 :]}"


def update(readme: Path, text: str, kind: str) -> None:
    """Replace what stands between the two marker lines of a kind of result.

    Raises:
        ValueError: the file lacks a marker.
    """
    begin, end = f"<!-- bench-{kind}:begin -->", f"<!-- bench-{kind}:end -->"
    content = readme.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{readme} must contain the lines {begin} and {end}; put them where the table belongs.")
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, help="a JSON file; else the newest under benchmarks/results")
    parser.add_argument("--kind", default="cpu", choices=("cpu", "model"), help="of the newest result")
    parser.add_argument("--plot", type=Path, help="draw a picture here")
    parser.add_argument("--update", type=Path, help="put the tables into this markdown file")
    parser.add_argument("--text", action="store_true", help="print the aligned table instead of markdown")
    options = parser.parse_args(arguments)
    from benchmarks.model import report as model_report

    path = options.result or max(RESULTS.glob(f"*/{options.kind}-*.json"), key=lambda p: p.name, default=None)
    if path is None:
        print(f"no result yet; run make bench-{options.kind}", file=sys.stderr)
        return 1
    result = json.loads(path.read_text(encoding="utf-8"))
    kind = kind_of(result)
    text = model_report.markdown(result) if kind == "model" else markdown(result)
    aligned = model_report.text(result) if kind == "model" else table(result)
    print(aligned if options.text else text)
    if options.plot:
        (model_report.draw if kind == "model" else draw)(result, options.plot)
    if options.update:
        update(options.update, text, kind)
    return 0
