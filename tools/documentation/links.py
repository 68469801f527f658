"""The links of Markdown files: where they are, what they name, and the anchors that headings make on GitHub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["anchors", "links", "markdown_files", "prose", "relinked"]

_FENCE = re.compile(r"^(\s*)(```+|~~~+)")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+(?:\([^()]*\))?)\)")
_TAG = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"")
_SPAN = re.compile(r"`+[^`]*`+")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
_NOT_OURS = {".git", "build", "dist", "site", "node_modules"}


def markdown_files(root: Path) -> list[Path]:
    """Return every Markdown file of a checkout, but for what was built or installed in it."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in _NOT_OURS and not n.startswith((".venv", ".pytest", ".hypothesis"))]
        found += [Path(folder) / name for name in files if name.endswith(".md")]
    return sorted(found)


def prose(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each line of a Markdown file, and whether it is text: neither a fence nor in one."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence:
            yield line, False
            if mark and mark[2].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif mark:
            fence = mark[2]
            yield line, False
        else:
            yield line, True


def links(text: str) -> list[str]:
    """Return the targets of all links and pictures of a Markdown file, those of HTML tags included."""
    words = "".join(_SPAN.sub("``", line) if is_text else "\n" for line, is_text in prose(text))
    return [match[3] for match in _LINK.finditer(words)] + _TAG.findall(words)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a Markdown file, and those given by hand."""
    found: dict[str, int] = {}
    names: set[str] = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))
    for line, is_text in prose(text):
        if is_text and (heading := _HEADING.match(line)):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
            name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            count = found[name] = found.get(name, -1) + 1
            names.add(f"{name}-{count}" if count else name)
    return names


def relinked(text: str, change: Callable[[str], str | None]) -> str:
    """Return a Markdown file with other links.

    Args:
        text: the file.
        change: target -> what to write in its place; None makes a link plain text.
    """

    def replace(match: re.Match[str]) -> str:
        target = change(match[3])
        return match[2] if target is None else f"{match[1]}[{match[2]}]({target})"

    def replace_tag(match: re.Match[str]) -> str:
        target = change(match[1])
        return match[0] if target is None else match[0].replace(match[1], target)

    def one_line(line: str) -> str:
        spans = [(m.start(), m.end()) for m in _SPAN.finditer(line)]
        outside = lambda m: not any(a <= m.start() and m.end() <= b for a, b in spans)  # noqa: E731
        line = _LINK.sub(lambda m: replace(m) if outside(m) else m[0], line)
        return _TAG.sub(replace_tag, line)

    # A link may go over the end of a line: paragraphs are looked at as a whole.
    parts: list[str] = []
    paragraph = ""
    for line, is_text in prose(text):
        if is_text and line.strip():
            paragraph += line
            continue
        parts += [one_line(paragraph), line]
        paragraph = ""
    return "".join([*parts, one_line(paragraph)])
