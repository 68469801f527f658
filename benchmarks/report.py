"""Turn stored results into tables, sections of a document and pictures, so that no number is typed by hand.

    python -m benchmarks report                       newest result of the attention core, as markdown
    python -m benchmarks report RESULT.json --text
    python -m benchmarks report --kind model --plot docs/images/model.png
    python -m benchmarks report --update              every section, figure and picture of every document
    python -m benchmarks report --update README.md    those of one document

`--update` replaces what stands between the lines `<!-- NAME:begin -->` and `<!-- NAME:end -->`, NAME being one of
`SECTIONS`; the figures between `<!-- figure:NAME -->` and `<!-- /figure -->`; and it draws the pictures images/KIND.png
that the document shows. Newest is the newest whole result on one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import tables, throughput
from benchmarks.harness.arguments import existing_file
from benchmarks.harness.plots import PICTURES
from benchmarks.harness.process import RESULTS, ROOT
from benchmarks.harness.quotes import QUOTED, replace_quotes
from benchmarks.training.memory import section as training_memory

__all__ = ["KINDS", "SECTIONS", "documents", "main", "newest", "picture_of", "update", "update_each"]

KINDS = (
    "cpu",
    "model",
    "texts",
    "tensorflow",
    "train",
    "linear",
    "adapters",
    "memory",
    "training_memory",
    "convergence",
    "gpu",
)

# Not a string, which would be taken for a name.
EVERY = Path("every document")


def _tables(result: dict[str, Any]) -> str:
    # A document shows what was measured; bars are those of the day, and stay with the result.
    return tables.markdown(result, figures=False)


def _other_models(result: dict[str, Any]) -> str:
    rows = tables.markdown_rows(throughput.others_rows(result))
    return "\n".join([*rows, "", tables.sentence(result)])


# Name of a section in a document: kind of the result, and what is written of it.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    **{f"bench-{kind}": (kind, _tables) for kind in KINDS},
    "other-models": ("texts", _other_models),
    "training-memory": ("training_memory", training_memory),
}


def documents() -> list[Path]:
    """Return the documents of the checkout that show results."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    contents = {path: path.read_text(encoding="utf-8") for path in found}
    return [path for path in found if QUOTED.search(contents[path]) or _sections(contents[path])]


def _sections(content: str) -> list[str]:
    return [name for name in SECTIONS if f"<!-- {name}:begin -->" in content]


def picture_of(kind: str, content: str) -> str | None:
    """Return the path, as a document has it, of the picture of a kind that it shows; None where it shows none."""
    found = re.search(rf"\(([^)\s]*images/{kind}\.png)\)", content)
    return found.group(1) if found and kind in PICTURES else None


def newest(kind: str, threads: int = 1) -> dict[str, Any] | None:
    """Return the newest whole result of a kind; a quick, partial or interrupted one where there is no other."""
    part = None
    for path in sorted(RESULTS.glob(f"*/{kind}-*.json"), key=lambda path: _date(path.name), reverse=True):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = result.get("settings", {})
        if settings.get("threads", 1) != threads:
            continue
        if not (settings.get("quick", False) or settings.get("only")) and result.get("complete", True):
            return result
        part = part or result
    return part


def _date(name: str) -> str:
    found = re.search(r"\d{4}-\d\d-\d\d-\d{6}", name)
    return found.group() if found else ""


def render(result: dict[str, Any], *, text: bool) -> str:
    """Return a result as aligned text, or as markdown; one of a GPU is text, one of training's memory markdown."""
    if tables.kind_of(result) == "training_memory":
        return training_memory(result)
    if "stages" in result:
        from benchmarks.gpu.table import table

        return table(result)
    return tables.text(result) if text else tables.markdown(result)


def update(document: Path, results: dict[str, dict[str, Any]]) -> list[Path]:
    """Write the sections and figures of the kinds given into a document and draw its pictures; return what was written.

    Raises:
        ValueError: the document shows nothing of any of the kinds, or names a figure that there is not.
    """
    content, written = document.read_text(encoding="utf-8"), []
    quoted = replace_quotes(content, results)
    if quoted != content:
        document.write_text(quoted, encoding="utf-8")
    if QUOTED.search(content):
        written.append(document)
    for name in _sections(content):
        kind, text = SECTIONS[name]
        if kind in results:
            tables.replace_section(document, name, ["", text(results[kind]), ""])
            written.append(document)
    for kind, result in results.items():
        if picture := picture_of(kind, content):
            PICTURES[kind](result, document.parent / picture)
            written.append(document.parent / picture)
    if not written:
        names = ", ".join(f"<!-- {name}:begin -->" for name, (kind, _) in SECTIONS.items() if kind in results)
        raise ValueError(f"{document} must contain {names} and the same with end; put them where the tables belong.")
    return list(dict.fromkeys(written))


def update_each(paths: Iterable[Path], results: dict[str, dict[str, Any]]) -> int:
    """Update several documents, name what was written and what not; return the exit status."""
    status = 0
    for path in paths:
        try:
            print("\n".join(f"written: {found}" for found in update(path, results)))
        except ValueError as error:  # the others are still written
            print(f"not written: {error}", file=sys.stderr)
            status = 1
    return status


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
    parser.add_argument(
        "--update", nargs="?", const=EVERY, type=existing_file,
        help="put tables, figures and pictures into this markdown file; without a name into every one",
    )  # fmt: skip
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
    kind, result = next(iter(results.items()))
    if options.plot:
        if kind not in PICTURES:
            print(f"--plot: there are pictures of {', '.join(PICTURES)}, not of {kind}", file=sys.stderr)
            return 2
        PICTURES[kind](result, options.plot)
    if options.update:
        return update_each(documents() if options.update == EVERY else [options.update], results)
    print(render(result, text=options.text))
    return 0
