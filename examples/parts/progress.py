"""How far a run is and how long it will take yet: a line that is written over, or now and then a new one in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["Progress", "duration"]

ON_SCREEN, IN_LOG = 0.2, 30.0  # seconds between lines


def duration(seconds: float) -> str:
    """Return a time as people say it: 45 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Progress:
    """Progress of a number of steps, written to stderr.

    Args:
        total: steps.
        what: what they do.
        first: those done already, by an earlier run.
    """

    def __init__(self, total: int, what: str, first: int = 0) -> None:
        self._total, self._what, self._first = total, what, first
        self._screen = sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def at(self, done: int, note: str = "") -> None:
        """Say that so many steps are done."""
        now = time.monotonic()
        if now - self._last < (ON_SCREEN if self._screen else IN_LOG) or done == self._first:
            return
        self._last = now
        left = (now - self._start) / (done - self._first) * (self._total - done)
        line = f"{self._what}: {done}/{self._total}{'  ' + note if note else ''}  {duration(left)} left"
        if self._screen:
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for other output."""
        if self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
            self._width = 0
