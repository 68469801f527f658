"""Turn stored results into tables, sections of a document and pictures, so that no number is typed by hand.

    python -m benchmarks report                       newest result of the attention core, as markdown
    python -m benchmarks report RESULT.json --text
    python -m benchmarks report --kind model --plot docs/images/model.png
    python -m benchmarks report --update README.md    every section and picture that the document has

`--update` replaces what stands between the lines `<!-- bench-KIND:begin -->` and `<!-- bench-KIND:end -->`, and draws
the pictures images/KIND.png that the document shows. Newest is the newest whole result on one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.arguments import existing_file
from benchmarks.harness.plots import PICTURES
from benchmarks.harness.process import RESULTS

__all__ = ["KINDS", "main", "newest", "update"]

KINDS = ("cpu", "model", "tensorflow", "train", "linear", "adapters", "memory", "convergence", "gpu")


def newest(kind: str, threads: int = 1) -> dict[str, Any] | None:
    """Return the newest result of a kind that is not a quick one; a quick one where there is no other."""
    quick = None
    for path in sorted(RESULTS.glob(f"*/{kind}-*.json"), key=lambda path: _date(path.name), reverse=True):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = result.get("settings", {})
        if settings.get("threads", 1) != threads:
            continue
        if not settings.get("quick", False):
            return result
        quick = quick or result
    return quick


def _date(name: str) -> str:
    found = re.search(r"\d{4}-\d\d-\d\d-\d{6}", name)
    return found.group() if found else ""


def render(result: dict[str, Any], *, text: bool) -> str:
    """Return a result as aligned text, or as markdown; one of a GPU is text."""
    if "stages" in result:
        from benchmarks.gpu.table import table

        return table(result)
    return tables.text(result) if text else tables.markdown(result)


def update(document: Path, results: dict[str, dict[str, Any]]) -> list[Path]:
    """Write the sections of the kinds given into a document and draw its pictures; return what was written.

    Raises:
        ValueError: the document has no section for any of the kinds.
    """
    content, written = document.read_text(encoding="utf-8"), []
    for kind, result in results.items():
        # A document shows what was measured; bars are those of the day, and stay with the result.
        if f"<!-- bench-{kind}:begin -->" in content:
            tables.replace_section(document, f"bench-{kind}", ["", tables.markdown(result, figures=False), ""])
            written.append(document)
        picture = re.search(rf"\(([^)]*images/{kind}\.png)\)", content)
        if picture and kind in PICTURES:
            path = document.parent / picture.group(1)
            PICTURES[kind](result, path)
            written.append(path)
    if not written:
        names = ", ".join(f"<!-- bench-{kind}:begin -->" for kind in results)
        raise ValueError(f"{document} must contain {names} and the same with end; put them where the tables belong.")
    return list(dict.fromkeys(written))


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "result", nargs="?", type=existing_file, help="a JSON file; else the newest under benchmarks/results"
    )
    parser.add_argument("--kind", default="", choices=KINDS, help="of the newest result; cpu, or with --update all")
    parser.add_argument("--threads", type=int, default=1, help="of the newest result")
    parser.add_argument("--plot", type=Path, help="draw a picture here")
    parser.add_argument("--update", type=existing_file, help="put tables and pictures into this markdown file")
    parser.add_argument("--text", action="store_true", help="print the aligned table instead of markdown")
    options = parser.parse_args(arguments)
    if options.result:
        result = json.loads(options.result.read_text(encoding="utf-8"))
        results = {tables.kind_of(result).partition("-")[0]: result}
    else:
        wanted = [options.kind] if options.kind else list(KINDS) if options.update else ["cpu"]
        results = {kind: found for kind in wanted if (found := newest(kind, options.threads))}
    if not results:
        what = f"{options.kind or 'cpu'} with {options.threads} thread(s)"
        print(f"no result of {what} is kept; see python -m benchmarks --help", file=sys.stderr)
        return 1
    if options.update:
        print("\n".join(f"written: {path}" for path in update(options.update, results)))
    kind, result = next(iter(results.items()))
    if options.plot:
        if kind not in PICTURES:
            print(f"--plot: there are pictures of {', '.join(PICTURES)}, not of {kind}", file=sys.stderr)
            return 2
        PICTURES[kind](result, options.plot)
    if not options.update:
        print(render(result, text=options.text))
    return 0
