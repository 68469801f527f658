"""Every link between files of the repository leads to a file that is there, and to a heading that it has."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tools.documentation import links, site

FILES = links.markdown_files(ROOT)


def broken(text: str, source: str, root: Path, address: str | None = None) -> list[str]:
    """The links of a file that lead nowhere; those to other hosts are not followed, but for the repository's."""
    found = []
    for target in links.links(text):
        inside = re.sub(rf"^{re.escape(address)}/(?:blob|raw|tree)/main/", "/", target) if address else target
        if re.match(r"[a-z]+:|//", inside):
            continue
        file, _, anchor = inside.partition("#")
        base = "" if file.startswith("/") else posixpath.dirname(source)
        path = root / posixpath.normpath(posixpath.join(base, file.lstrip("/"))) if file else root / source
        if not path.exists():
            found.append(f"{target}: there is no {path.relative_to(root)}")
        elif anchor and path.suffix == ".md" and anchor not in links.anchors(path.read_text(encoding="utf-8")):
            found.append(f"{target}: {path.relative_to(root)} has no heading of that name")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert broken(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix(), ROOT, site.address()) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](missing.md)", "there is no missing.md"),
        ("![a\nb](images/missing.png)", "there is no images/missing.png"),
        ('<img src="missing.png">', "there is no missing.png"),
        ("[a](#nowhere)", "page.md has no heading"),
        ("[a](other.md#nowhere)", "other.md has no heading"),
    ],
)
def test_a_broken_link_is_found(text, complaint, tmp_path):
    (tmp_path / "page.md").write_text(f"# Here `is` it, twice\n\n{text}\n", encoding="utf-8")
    (tmp_path / "other.md").write_text("## One\n\n## One\n", encoding="utf-8")
    (found,) = broken((tmp_path / "page.md").read_text(encoding="utf-8"), "page.md", tmp_path)
    assert complaint in found


def test_good_links_are_not_complained_of(tmp_path):
    text = "# Here `is` it, twice\n[a](#here-is-it-twice) [b](other.md#one-1) [c](https://x.org) `[d](e.md)`\n"
    (tmp_path / "other.md").write_text("## One\n\n## One\n\n```\n# none\n[f](g.md)\n```\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    assert broken(text, "page.md", tmp_path) == []
    assert links.links((tmp_path / "other.md").read_text(encoding="utf-8")) == []
