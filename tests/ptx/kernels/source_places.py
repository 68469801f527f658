"""Where in the source an instruction of a PTX module comes from, in words that survive a recompilation."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["SourcePlaces"]

_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_LOCATION = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:, function_name [^,]+, inlined_at (\d+) (\d+) (\d+))?")
_Place = tuple[int, int, int]  # number of a file, line, column


class SourcePlaces:
    """What a module compiled with -lineinfo says of its lines.

    A place reads "file: text of the line < file: text of the line that calls it". The functions of `primitives.h` are
    an instruction each, so what calls them is the place.
    """

    def __init__(self, ptx: str, sources: Path) -> None:
        self._files = {int(n): Path(path).name for n, path in _FILE.findall(ptx)}
        self._lines = {path.name: path.read_text(encoding="utf-8").split("\n") for path in sources.glob("*.*")}
        self._locations = [_LOCATION.match(line) for line in ptx.split("\n")]

    def of(self, line: int) -> str:
        """Return the place of a line of the PTX, counted from 1."""
        at, chain = line - 1, list[str]()
        wanted: _Place | None = None
        while at >= 0 and len(chain) < 2:
            found = self._locations[at]
            at -= 1
            if not found:
                continue
            here = tuple(map(int, found.groups()[:3]))
            if wanted is not None and here != wanted:
                continue
            if (name := self._files[here[0]]) in self._lines and name != "primitives.h":
                chain.append(f"{name}: {self._text(name, here[1])}")
            if found[4] is None:
                break
            wanted = (int(found[4]), int(found[5]), int(found[6]))
        return " < ".join(chain)

    def _text(self, name: str, line: int) -> str:
        return self._lines[name][line - 1].partition("//")[0].strip()
