"""Where an instruction of the PTX comes from: lines of Python or C++, by .loc."""

from __future__ import annotations

import bisect
import re
from functools import cached_property
from typing import NamedTuple

__all__ = ["Sources"]

_FILE = re.compile(r"^\s*\.file\s+(\d+)\s+\"([^\"]+)\"(?:\s+\"([^\"]+)\")?", re.M)
_LOCATION = re.compile(
    r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)"
    r"(?:,\s*function_name\s+\S+,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?"
    # Triton writes where functions were inlined into a comment.
    r"(?:\s*//[^@\n]*@\[([^\n]*))?"
)
_CALLER = re.compile(r"([\w.]+\.py):(\d+):\d+")


class _Location(NamedTuple):
    """One .loc: its line of the PTX, and where the code is from, the innermost function first."""

    line: int
    chain: tuple[str, ...]


class Sources:
    """The source lines of a PTX module."""

    def __init__(self, text: list[str]) -> None:
        """Read the lines of a module."""
        self._text = text

    def of(self, line: int) -> str:
        """Return the source of a line of the PTX, from 1: where it is, and from where that was called; "" if none."""
        index = bisect.bisect([location.line for location in self._locations], line) - 1
        return " from ".join(self._locations[index].chain) if index >= 0 else ""

    @cached_property
    def _locations(self) -> list[_Location]:
        text = "\n".join(self._text)
        files = {int(n): (second or first).rpartition("/")[2] for n, first, second in _FILE.findall(text)}
        found: list[_Location] = []
        chains: dict[tuple[str, ...], tuple[str, ...]] = {}
        for number, line in enumerate(self._text, 1):
            location = _LOCATION.match(line)
            if not location:
                continue
            here = location.group(1, 2, 3)
            chain = (f"{files.get(int(here[0]), here[0])}:{here[1]}",)
            if location[4]:
                # The caller's own .loc came before, and says who called it.
                caller = location.group(4, 5, 6)
                chain += chains.get(caller, (f"{files.get(int(caller[0]), caller[0])}:{caller[1]}",))
            elif location[7]:
                chain += tuple(f"{file}:{at}" for file, at in _CALLER.findall(location[7]))
            chains[here] = chain
            found.append(_Location(number, chain))
        return found
