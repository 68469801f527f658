"""Results as tables: aligned text, or markdown between two marks of a document."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import throughput
from benchmarks.registry import CANDIDATES
from deberta_kernels.demo.tables import aligned
from deberta_kernels.native import processor

__all__ = [
    "aligned", "blocks", "conditions", "cores", "figure_rows", "markdown", "markdown_rows", "replace_section",
    "sentence", "side_by_side", "text",
]  # fmt: skip

SKIPPED = ("not in --quick", "not in this run")
HEAD = ["figure", "case", "must", "aim", "medians", "minima", "at peak", "verdict"]
MEGABYTE = 1e6
# Kind in a file: key of its records, kind of its candidates, title of their times.
TIMES = {
    "cpu": ("core", "core", "attention core, ms"),
    "model": ("models", "model", "forward, ms"),
    "tensorflow": ("moved", "tensorflow", "forward, ms"),
    "train": ("steps", "train", "training step, ms"),
    "adapters": ("workloads", "adapters", "adapters, ms"),
    "linear": ("records", "linear", "linear layers of an encoder layer, ms"),
}


def number(value: float | None, unit: str) -> str:
    """Return a figure's value as every table prints it."""
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.0f} %"
    return f"{value:.1f}{unit}" if unit == "x" else f"{value:.0f} MB" if unit == "MB" else f"{value:.2f}{unit}"


def bound(figure: dict[str, Any], name: str) -> str:
    """Return a bar with its direction, "" where there is none."""
    sign = "≥" if figure["higher"] else "≤"
    return "" if figure[name] is None else f"{sign} {number(figure[name], figure['unit'])}"


def figure_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the figures that were measured, with a head; a title is written once."""
    rows, previous = [HEAD], ""
    for figure in result.get("figures", []):
        if figure["reason"] in SKIPPED or _not_installed(figure["reason"]):
            continue
        values = [number(figure[name], figure["unit"]) for name in ("median", "best")]
        values.append("" if figure["at_peak"] is None else number(figure["at_peak"], figure["unit"]))
        verdict = figure["verdict"] + (f": {figure['reason']}" if figure["reason"] else "")
        if figure["verdict"] in ("MISSED", "close") and _out_of_reach(figure):
            verdict += ", out of reach on this machine"
        title = "" if figure["title"] == previous else figure["title"]
        previous = figure["title"]
        rows.append([title, figure["case"], bound(figure, "must"), bound(figure, "aim"), *values, verdict])
    return rows


def _not_installed(reason: str) -> bool:
    """Tell whether nobody to compare with is there; one line under the tables says so for all shapes."""
    return bool(reason) and all("not installed" in part for part in reason.split("; "))


def _out_of_reach(figure: dict[str, Any]) -> bool:
    if figure["at_peak"] is None:
        return False
    return bool(figure["at_peak"] < figure["must"] if figure["higher"] else figure["at_peak"] > figure["must"])


def blocks(result: dict[str, Any]) -> list[list[list[str]]]:
    """Return the tables of a result, each with a head: times, peak memory, accuracies, figures."""
    kind = kind_of(result).partition("-")[0]
    found = []
    if kind in TIMES:
        key, candidates, title = TIMES[kind]
        columns = {name: candidate.heading for name, candidate in CANDIDATES[candidates].items()}
        found.append(_block(title, columns, result.get(key, []), _time))
        if "peaks" in result:
            found.append(_block("peak memory above the loaded model, MB", columns, result["peaks"], _megabytes))
    if kind == "texts":
        found.append(throughput.rows(result))
    if accuracy := result.get("accuracy"):
        both = zip(accuracy["patched"], accuracy["stock"], strict=True)
        rows = [[str(seed), f"{ours:.4f}", f"{stock:.4f}"] for seed, (ours, stock) in enumerate(both)]
        found.append([["accuracy, seed", "patched", "stock"], *rows])
        summary = [["mean difference", "bound", "standard error", "within", "equivalent at 5 %"]]
        values = [f"{accuracy[name]:.4f}" for name in ("mean_difference", "bound", "standard_error")]
        found.append([*summary, [*values, str(accuracy["within"]), str(accuracy["equivalent_at_5_percent"])]])
    found.append(figure_rows(result))
    return [rows for rows in found if len(rows) > 1]


def _block(title: str, columns: dict[str, str], records: list[dict[str, Any]], cell: Any) -> list[list[str]]:
    """Return one row per record, float32 and full batches first, with the candidates that some record has."""
    cells = [{name: cell(record, name) for name in columns} for record in records]
    used = [name for name in columns if any(row[name] for row in cells)]
    order = sorted(
        range(len(records)), key=lambda i: (_dtype(records[i]) != "float32", records[i].get("fill", 1.0) < 1)
    )
    rows = [[_label(records[i]), *(cells[i][name] for name in used)] for i in order]
    return [[title, *(columns[name] for name in used)], *rows]


def _dtype(record: dict[str, Any]) -> str:
    return str(record.get("dtype", "float32"))


def _label(record: dict[str, Any]) -> str:
    if "title" in record:
        return f"{record['title']}, {record['batch']}x{record['length']}{', training step' if record['train'] else ''}"
    if "tokens" in record:
        return f"{record['tokens']} tokens {record['dtype']}"
    return f"{record['label']} {record['dtype']}" + (" forward + backward" if record.get("backward") else "")


def _time(record: dict[str, Any], name: str) -> str:
    seconds = record.get("seconds", {}).get(name)
    if seconds is None and name in record.get("samples", {}):
        seconds = record["samples"][name]["median"]
    if seconds is not None:
        return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"
    if not record.get("checks", {}).get(name, {"ok": True})["ok"]:
        return "wrong"
    return "missing" if name in record.get("missing", {}) else ""


def _megabytes(record: dict[str, Any], name: str) -> str:
    value = record["bytes"].get(name)
    return "" if value is None else "failed" if isinstance(value, str) else f"{value / MEGABYTE:.0f}"


def kind_of(result: dict[str, Any]) -> str:
    """Return which kind a file says it is; the first ones did not say."""
    return "gpu" if "stages" in result else str(result.get("kind", "cpu"))


def text(result: dict[str, Any]) -> str:
    """Return every table as aligned text, under the conditions it was measured in."""
    lines = [conditions(result)]
    if result.get("rates_gflops"):
        lines.append("GFLOP/s: " + ", ".join(f"{k} {number_of(x)}" for k, x in result["rates_gflops"].items()))
    for rows in blocks(result):
        left = (0, 1, len(HEAD) - 1) if rows[0] == HEAD else (0,)
        lines += ["", aligned(rows, left=left, heads=1)]
    for name, why in missing(result).items():
        lines.append(f"{name}: {why}")
    counts: dict[str, int] = {}
    for figure in result.get("figures", []):
        name = figure["reason"] if figure["reason"] in SKIPPED else figure["verdict"]
        counts[name] = counts.get(name, 0) + 1
    tally = [", ".join(f"{count} {name}" for name, count in counts.items())] if counts else []
    return "\n".join([*lines, "", "; ".join([*tally, f"{result.get('seconds', 0):.0f} s"])])


def number_of(rate: float | None) -> str:
    """Return a rate in GFLOP/s without its unit."""
    return "-" if rate is None else f"{rate:.0f}"


def missing(result: dict[str, Any]) -> dict[str, str]:
    """Return candidate -> why some shape has no time of it."""
    keys = [*(key for key, _, _ in TIMES.values()), "texts"]
    records = [record for key in keys for record in result.get(key, [])]
    return {name: why for record in records for name, why in record.get("missing", {}).items()}


def conditions(result: dict[str, Any]) -> str:
    """Return one paragraph that says where and how the numbers were measured."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    commit = (result["commit"]["id"] or "unknown")[:8] + (" with changes" if result["commit"]["modified"] else "")
    rival = f"TensorFlow {versions['tensorflow']}, " if "tensorflow" in versions else ""
    after = f", {result['load_average_after'][0]} after" if "load_average_after" in result else ""
    return (
        f"{cores(result)}, {settings['clock']}; "
        f"backend {settings['backend']}, instruction set {result['library']['isa'] or 'none'}; "
        f"torch {versions['torch']} ({versions['torch_isa']}), transformers {versions['transformers']}, {rival}"
        f"Python {versions['python']}; commit {commit}, {result['date'][:10]}; "
        f"load {machine['load_average'][0]} before{after}"
        + ("; the library is not made of these sources" if result["library"]["stale"] else "")
        + ("; quick" if settings["quick"] else "")
        + ("" if result.get("complete", True) else "; stopped before its last shapes")
    )


def sentence(result: dict[str, Any]) -> str:
    """Return the conditions as a sentence of a document."""
    found = conditions(result)
    return f"{found[0].upper()}{found[1:]}."


def cores(result: dict[str, Any]) -> str:
    """Return how many cores of which processor computed, named as people do."""
    machine, threads = result["machine"], result["settings"]["threads"]
    name = processor.named(*(str(machine.get(key, "")) for key in ("processor", "family", "model", "stepping")))
    return f"{'one core' if threads == 1 else f'{threads} cores'} of {name}"


def markdown_rows(rows: list[list[str]], text: int = 1) -> list[str]:
    """Return the lines of a markdown table whose first columns are text, and the others numbers."""
    text = len(rows[0]) if rows[0] == HEAD else text
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * text + "---:|" * (len(rows[0]) - text), *lines[1:]]


def markdown(result: dict[str, Any], *, figures: bool = True) -> str:
    """Return every table and the conditions as markdown, slower shapes included; `figures` with their bars as well."""
    lines: list[str] = []
    for rows in blocks(result):
        if rows[0] == HEAD and not figures:
            continue
        lines += [*markdown_rows(rows), ""]
    model = f"{result['settings']['model']}; medians. " if "model" in result["settings"] else "Medians. "
    return "\n".join([*lines, f"{model}{sentence(result)}"])


def side_by_side(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures of several instruction sets in columns, medians."""
    if not results:
        return "no instruction set could be measured"
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for isa, result in results.items():
        for figure in result["figures"]:
            if figure["verdict"] != "none":
                cell = "RED" if figure["verdict"] == "RED" else number(figure["median"], figure["unit"])
                columns.setdefault((figure["title"], figure["case"]), {})[isa] = cell
    rows = [["figure", "case", *results]]
    rows += [[title, case, *(cells.get(isa, "-") for isa in results)] for (title, case), cells in columns.items()]
    rates = {isa: result["rates_gflops"] for isa, result in results.items()}
    for name in next(iter(rates.values())):
        rows.append(["GFLOP/s", name, *(number_of(rates[isa].get(name)) for isa in results)])
    return aligned(rows, left=(0, 1), heads=1)


def replace_section(path: Path, name: str, lines: Iterable[str]) -> None:
    """Replace what stands between the two marks of a name in a document.

    Raises:
        ValueError: the document lacks a mark.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = path.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{path} must contain the lines {begin} and {end}; put them where the table belongs.")
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")
