"""A long run says how much is done and about how long the rest takes, in one process and in several."""

import re
import subprocess
import sys

import pytest

from tests import progress

CONFTEST = """
from tests import progress

def pytest_configure(config):
    progress.register(config, every=0.0)
"""
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_one(number):
    assert number != 2
"""
LINE = re.compile(r"^\[\d\d:\d\d:\d\d\] (\d) of 4 tests done, ([01]) failed; \d+ s so far, about \d+ s left, by (.+)$")


def test_without_an_earlier_run_the_share_of_tests_counts():
    pace = progress.Pace("abcd", {})
    assert pace.left(0.0) is None
    pace.finish("a", 2.0)
    # Two processes: 2 s of work in 1 s.
    assert pace.left(1.0) == pytest.approx(3.0)
    assert (pace.done, pace.count, pace.informed) == (1, 4, False)


def test_an_earlier_run_tells_what_tests_take_and_this_one_how_slow_the_machine_is():
    pace = progress.Pace("abc", {"a": 1.0, "b": 5.0, "c": 3.0, "gone": 1000.0})
    assert pace.informed
    pace.finish("a", 2.0)
    # Twice as slow as before, but what that says of the rest is little as long as little is done.
    assert pace.left(2.0) == pytest.approx((2 + 2.7) / (1 + 2.7) * (5 + 3))
    pace.finish("b", 10.0)
    assert pace.left(12.0) == pytest.approx((12 + 2.7) / (6 + 2.7) * 3)
    for test in "cc":
        pace.finish(test, 6.0)
    assert pace.done == 3
    assert pace.left(18.0) == 0.0


def test_tests_without_an_earlier_time_take_what_their_like_take():
    pace = progress.Pace("abcdefg", {"a": 0.1, "b": 0.1})
    pace.finish("a", 0.1)
    assert pace.left(0.1) == pytest.approx(0.1 * 6)
    pace.finish("c", 9.9)
    assert pace.left(10.0) == pytest.approx(0.1 + 4 * 9.9)
    assert not pace.informed


def test_tests_that_took_no_time_that_a_clock_sees_count():
    pace = progress.Pace("ab", {"a": 0.0, "b": 0.0})
    pace.finish("a", 0.0)
    assert pace.left(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (629, "10 min"), (631, "11 min"), (7200, "120 min")],
)
def test_durations_in_words(seconds, words):
    assert progress.spoken(seconds) == words


@pytest.mark.parametrize("options", [[], ["-p", "xdist.plugin", "-n", "2"]], ids=" ".join)
def test_lines_stand_alone_and_pytests_summary_is_last(options, request, tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = [sys.executable, "-m", "pytest", "--tb=no", *options]
    sources = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        found = [match for line in lines if (match := LINE.match(line))]
        assert [int(match[1]) for match in found] == [1, 2, 3], done.stdout
        assert "1 failed, 3 passed" in lines[-1]
        sources.append({match[3] for match in found})
    assert sources == [{"the share of tests done"}, {"the times of the last run"}]
