"""A line every half minute of a long run: how many tests are done and failed, and about how long the others take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import pytest

__all__ = ["Pace", "Progress", "register", "spoken"]

_EVERY = 30.0
_CACHE = "deberta_kernels/seconds"
# The share of the earlier run by which this machine counts as fast as that one, whatever the first tests took.
_INERTIA = 0.3
# A test takes something even if the clock saw nothing.
_LEAST = 0.001


def register(config: pytest.Config, every: float = _EVERY) -> None:
    """Show progress in the process that prints; with pytest-xdist that is the one that runs no test."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config, every))


def spoken(seconds: float) -> str:
    """Return a duration in words: 42 s, 3 min 10 s, 25 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 10 or not minutes:
        return f"{minutes + (rest >= 30)} min" if minutes else f"{rest} s"
    return f"{minutes} min {rest} s"


class Pace:
    """The tests of a run, those done and those ahead, and what they take.

    A test ahead takes what it took in an earlier run, times what those done took of theirs; one that has no earlier
    time takes the mean of its like among those done. So neither the speed of the machine nor the number of processes
    need be those of the earlier run.

    Args:
        tests: ids of all tests of the run.
        seconds: what tests took in an earlier run, by id.
    """

    def __init__(self, tests: Iterable[str], seconds: Mapping[str, float]) -> None:
        # None: there is no earlier time.
        self._ahead = {test: max(seconds[test], _LEAST) if test in seconds else None for test in tests}
        self.count = len(self._ahead)
        self._foreseen = self._took_known = self._took_new = 0.0
        self._new = 0
        self._inertia = _INERTIA * sum(filter(None, self._ahead.values()))

    @property
    def done(self) -> int:
        return self.count - len(self._ahead)

    @property
    def informed(self) -> bool:
        """Whether most of the tests ahead have an earlier time."""
        return sum(seconds is not None for seconds in self._ahead.values()) > len(self._ahead) / 2

    def finish(self, test: str, took: float) -> None:
        """Count a test as done that took so many seconds; one that is no longer ahead counts once."""
        if test not in self._ahead:
            return
        foreseen, took = self._ahead.pop(test), max(took, _LEAST)
        if foreseen is None:
            self._new += 1
            self._took_new += took
        else:
            self._foreseen += foreseen
            self._took_known += took

    def left(self, elapsed: float) -> float | None:
        """Return the seconds that the rest will take when `elapsed` seconds went to what is done, or None at first."""
        if not self.done:
            return None
        took = self._took_known + self._took_new
        slowness = (self._took_known + self._inertia) / (self._foreseen + self._inertia) if self._inertia else 1.0
        each_new = self._took_new / self._new if self._new else took / self.done
        ahead = sum(each_new if seconds is None else seconds * slowness for seconds in self._ahead.values())
        # Several processes take more seconds than go by, and between tests some go by too.
        return ahead * elapsed / took


class Progress:
    """The plugin: it listens to the reports of all processes, and keeps what each test took for the next run."""

    def __init__(self, config: pytest.Config, every: float = _EVERY, clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._every = every
        self._clock = clock
        # Absent under `-p no:cacheprovider`.
        self._cache: pytest.Cache | None = getattr(config, "cache", None)
        self._before: dict[str, float] = self._cache.get(_CACHE, {}) if self._cache else {}
        self._took: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._pace: Pace | None = None

    def _start(self, tests: Iterable[str]) -> None:
        if self._pace is None:
            self._pace = Pace(tests, self._before)
            self._started = self._shown = self._clock()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start where one process does all; the controller of several collects nothing."""
        if session.items:
            self._start(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        """Start with the first process that knows all tests."""
        self._start(ids)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._took[report.nodeid] += report.duration
        if report.failed:
            self._failed.add(report.nodeid)
        if report.when != "teardown" or self._pace is None:
            return
        self._pace.finish(report.nodeid, self._took[report.nodeid])
        if self._clock() - self._shown >= self._every and self._pace.done < self._pace.count:
            self._shown = self._clock()
            self._show()

    def _show(self) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            return
        reporter.ensure_newline()
        terminal = self._config.get_terminal_writer()
        if terminal.width_of_current_line:  # Dots of a run in several processes.
            terminal.line()
        terminal.line(self._line())
        terminal.flush()

    def _line(self) -> str:
        assert self._pace is not None
        elapsed = self._clock() - self._started
        left = self._pace.left(elapsed)
        source = "the times of the last run" if self._pace.informed else "the share of tests done"
        return (
            f"[{time.strftime('%H:%M:%S')}] {self._pace.done:,} of {self._pace.count:,} tests done, "
            f"{len(self._failed)} failed; {spoken(elapsed)} so far, "
            + ("" if left is None else f"about {spoken(left)} left, by {source}")
        )

    def pytest_sessionfinish(self) -> None:
        """Keep what each test took; tests that did not run keep what they had."""
        if self._cache and self._took:
            rounded = {test: round(seconds, 3) for test, seconds in self._took.items()}
            self._cache.set(_CACHE, self._before | rounded)
