"""The pages of the site: gathered from the whole repository, linked as the site has them, all of them in the menu."""

from __future__ import annotations

import re

import pytest

from tests.checkout import ROOT
from tests.docs.test_links import broken
from tools.documentation import links, site

MENU = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "pages"
    site.gather(folder)
    return folder


def test_every_page_is_in_the_menu_once(pages):
    assert sorted(MENU) == sorted(path.relative_to(pages).as_posix() for path in pages.rglob("*.md"))


def test_links_of_the_site_lead_to_pages(pages):
    for path in sorted(pages.rglob("*.md")):
        assert broken(path.read_text(encoding="utf-8"), path.relative_to(pages).as_posix(), pages) == []


def test_every_page_has_one_title(pages):
    for path in sorted(pages.rglob("*.md")):
        lines = [line for line, is_text in links.prose(path.read_text(encoding="utf-8")) if is_text]
        assert sum(line.startswith("# ") for line in lines) == 1, path.name


def test_lists_and_tables_stand_apart(pages):
    """GitHub needs no empty line before a list or table, and two spaces before a nested item; others need more."""
    found = []
    for path in sorted(pages.rglob("*.md")):
        before = ""
        for line, is_text in links.prose(path.read_text(encoding="utf-8")):
            item = re.match(r"( *)([*+-]|\d+\.) ", line) if is_text else None
            row = is_text and re.match(r"\|.*\|$", line.rstrip())
            apart = not before.strip() or re.match(r"( *([*+-]|\d+\.) |#| {2}|\|)", before)
            if ((item or row) and not apart) or (item and len(item[1]) % 4):
                found.append(f"{path.name}: {line.strip()}")
            before = line
    assert found == []


def test_markdown_in_html_is_read_as_such(pages):
    assert not any("<details>" in path.read_text(encoding="utf-8") for path in pages.rglob("*.md"))


@pytest.mark.parametrize(
    ("link", "source", "goal"),
    [
        ("docs/gpu.md#zones", "README.md", "gpu.md#zones"),
        ("../CONTRIBUTING.md", "docs/architecture.md", "contributing.md"),
        ("../missing.md", "docs/gpu.md", "../missing.md"),  # it stays, and the build fails
        ("../../csrc/README.md", "docs/notes/gpu.md", "../code/cpu.md"),
        ("images/zones.svg", "docs/how-it-works.md", "images/zones.svg"),
        ("#here", "README.md", "#here"),
        ("https://example.org", "README.md", "https://example.org"),
    ],
)
def test_links_between_files_become_links_between_pages(link, source, goal):
    page = site.PAGES.get(source, source.removeprefix("docs/"))
    assert site._target(link, source, page) == goal


def test_files_that_are_no_pages_are_in_the_repository_or_plain_text(monkeypatch):
    monkeypatch.setattr(site, "address", lambda: None)
    assert site._target("LICENSE", "README.md", "index.md") is None
    monkeypatch.setattr(site, "address", lambda: "https://example.org/x")
    assert site._target("LICENSE", "README.md", "index.md") == "https://example.org/x/blob/main/LICENSE"
    assert site._target("../csrc", "docs/gpu.md", "gpu.md") == "https://example.org/x/tree/main/csrc"
    picture = "https://example.org/x/raw/main/docs/images/zones.svg"
    assert site._target(picture, "README.md", "index.md") == "images/zones.svg"


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<img alt="" src="https://badges.example/x.svg">',
        '<div class="md-source" data-md-component="source"></div>',
        '<pre class="mermaid"><code>graph LR</code></pre>',
        "<style>@import url(https://fonts.example/x.css)</style>",
    ],
)
def test_what_comes_from_another_host_is_found(text, tmp_path):
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    (found,) = site.foreign(tmp_path)
    assert found.startswith("index.html: ")


def test_links_to_other_hosts_are_allowed(tmp_path):
    text = '<a href="https://arxiv.org/x">paper</a><link rel="canonical" href="https://example.org"><img src="x.png">'
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    assert site.foreign(tmp_path) == []
