"""Documents and results agree: sections, figures in sentences, pictures."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.harness import plots
from benchmarks.harness.process import ROOT, file_name
from benchmarks.harness.quotes import QUOTED, QUOTES, replace_quotes
from tests import needs
from tests.benchmarks.results import texts_result

DOCUMENTS = report.documents()
NEWEST = {kind: result for kind in report.KINDS if (result := report.newest(kind))}
# What a command writes, and what other people measured.
NOT_PROSE = (
    r"<!-- (\S+):begin -->.*?<!-- \1:end -->",
    QUOTED.pattern,
    r"## Quality, as published.*?\n## ",
    r"```.*?```",
)
FIGURE = re.compile(r"\d(?:[\d.,]*\d)?(?:x\b| ?%| times\b| ms\b| MB\b| GB\b| MiB\b| tokens per second)")
HELP = "run `python -m benchmarks report --update`, and commit what it writes"


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_a_document_says_what_the_newest_results_say(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PICTURES", {})
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    report.update(copy, NEWEST)
    assert copy.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), HELP


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_no_measured_figure_is_typed_by_hand(path: Path) -> None:
    prose = path.read_text(encoding="utf-8")
    for pattern in NOT_PROSE:
        prose = re.sub(pattern, "", prose, flags=re.DOTALL)
    assert FIGURE.findall(prose) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_no_line_begins_with_a_figure(path: Path) -> None:
    # A comment at the beginning of a line ends the paragraph before it.
    assert re.findall(r"^ *(?:[>*-] +)*<!-- figure:.*", path.read_text(encoding="utf-8"), re.MULTILINE) == []


def test_the_documents_that_show_results_are_found() -> None:
    assert {"README.md", "docs/speed.md", "docs/modernbert.md", "docs/training.md"} <= set(map(_name, DOCUMENTS))


def _png_text(path: Path) -> dict[str, str]:
    """Return the texts that a PNG file carries."""
    content, place, found = path.read_bytes(), 8, {}
    while place < len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        if kind == b"tEXt":
            key, _, value = content[place + 8 : place + 8 + size].partition(b"\0")
            found[key.decode("latin-1")] = value.decode("latin-1")
        place += size + 12
    return found


@pytest.mark.parametrize("kind", plots.PICTURES)
def test_a_picture_is_drawn_from_the_newest_result(kind: str) -> None:
    shown = [(path, picture) for path in DOCUMENTS if (picture := report.picture_of(kind, path.read_text("utf-8")))]
    assert shown
    for path, picture in shown:
        assert _png_text(path.parent / picture)["Source"] == file_name(kind, NEWEST[kind]), HELP


def test_a_wrong_figure_is_replaced_and_an_unknown_one_refused() -> None:
    results = {"texts": texts_result()}
    text = "<!-- figure:mixed:patched -->99<!-- /figure --> times, <!-- figure:linear-share -->1%<!-- /figure -->."
    replaced = replace_quotes(text, results)
    assert "<!-- figure:mixed:patched -->8.0<!-- /figure -->" in replaced
    assert "<!-- figure:linear-share -->1%<!-- /figure -->" in replaced  # no result of its kind was given
    with pytest.raises(ValueError, match="there is no figure 'mixed:nobody'"):
        replace_quotes("<!-- figure:mixed:nobody -->1<!-- /figure -->", results)


def test_every_figure_that_can_be_quoted_has_a_value() -> None:
    for name, (kind, quote) in QUOTES.items():
        assert quote(NEWEST[kind]), name


def test_one_command_renews_every_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.package("matplotlib")
    first, second = tmp_path / "README.md", tmp_path / "docs" / "speed.md"
    second.parent.mkdir()
    first.write_text("![x](docs/images/texts.png)\n<!-- bench-texts:begin -->\n<!-- bench-texts:end -->\n", "utf-8")
    second.write_text("<!-- figure:sentences:patched -->?<!-- /figure -->\n", "utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    results: dict[str, Any] = {"texts": texts_result()}
    monkeypatch.setattr(report, "newest", lambda kind, threads: results.get(kind))
    assert report.main(["--update"]) == 0
    assert "| patched, float32 | 80 | 8.0 |" in first.read_text("utf-8")
    assert "-->4.0<!--" in second.read_text("utf-8")
    assert _png_text(tmp_path / "docs" / "images" / "texts.png")["Source"] == file_name("texts", results["texts"])


def test_a_document_without_a_result_is_named_and_the_others_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, found = tmp_path / "lost.md", tmp_path / "found.md"
    lost.write_text("<!-- bench-linear:begin -->\n<!-- bench-linear:end -->\n", "utf-8")
    found.write_text("<!-- figure:sentences:patched -->?<!-- /figure -->\n", "utf-8")
    assert report.update_each([lost, found], {"texts": texts_result()}) == 1
    assert "lost.md must contain <!-- bench-texts:begin -->" in capsys.readouterr().err
    assert "-->4.0<!--" in found.read_text("utf-8")
