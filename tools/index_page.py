"""README.md as a package index shows it: every link and picture with its whole address."""

from __future__ import annotations

import re
from pathlib import Path

PICTURES = (".png", ".svg", ".gif")
# A link, unless it stands in code.
LINK = re.compile(r"```.*?```|`[^`\n]*`|(!?\[[^\]]*\]\()([^)\s]+)(\))", re.DOTALL)
SOURCE = re.compile(r'^Source = "([^"]+)"$', re.MULTILINE)
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


def index_page(root: Path) -> str:
    """Return README.md's text with the addresses that the files of this release have in the repository.

    Args:
        root: folder of README.md, of pyproject.toml, which has the repository's address as `Source`, and of the
            package, which has the version; the release's tag is `v` and the version.

    Raises:
        ValueError: one of the two is not there.
    """
    release = f"v{version(root)}"
    repository = address(root)

    def whole(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if target is None or re.match(r"[a-z]+:|#|//", target):
            return match[0]
        way = "raw" if target.endswith(PICTURES) else "blob"
        return f"{before}{repository}/{way}/{release}/{target}{after}"

    return LINK.sub(whole, (root / "README.md").read_text(encoding="utf-8"))


def address(root: Path) -> str:
    """Return the address of the repository; raise ValueError where pyproject.toml has none."""
    return _only(SOURCE, root / "pyproject.toml").rstrip("/")


def version(root: Path) -> str:
    """Return the version of the package; raise ValueError where it has none."""
    return _only(VERSION, root / "deberta_kernels" / "__init__.py")


def _only(line: re.Pattern[str], path: Path) -> str:
    found = line.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} has no line like {line.pattern}")
    return found[1]
