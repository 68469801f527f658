"""Notices: counts are exact, each reason is told once."""

import itertools
import threading
import time
import warnings

import pytest

import deberta_kernels as dk
from deberta_kernels import notices
from deberta_kernels.backends import BACKENDS


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    notices.reset_stats()
    yield
    notices.reset_stats()


def test_counts_are_exact_from_many_threads():
    def work():
        for _ in range(2000):
            notices.count_call("torch")
            notices.record_fallback("a reason")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert notices.stats()["calls"]["torch"] == 16000
    assert notices.stats()["fallbacks"] == {"a reason": 16000}
    notices.reset_stats()
    assert notices.stats() == {"calls": dict.fromkeys(BACKENDS, 0), "fallbacks": {}}


def test_stats_is_a_copy():
    notices.stats()["calls"]["cpu"] = 7
    assert notices.stats()["calls"]["cpu"] == 0


def test_fallback_counts_each_call_and_warns_once_per_reason():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            notices.fallback("output_attentions=True needs the probabilities", "pass output_attentions=False", False)
        notices.fallback("another reason", "another remedy", False)
    assert [warning.category for warning in caught] == [dk.DebertaKernelsWarning] * 2
    assert "original attention code: output_attentions=True needs the probabilities; pass" in str(caught[0].message)
    assert notices.stats()["fallbacks"] == {
        "output_attentions=True needs the probabilities": 3,
        "another reason": 1,
    }


def test_strict_fallback_raises_the_same_text():
    with pytest.raises(NotImplementedError, match=r"^a reason; a remedy\.$"):
        notices.fallback("a reason", "a remedy", True)
    assert notices.stats()["fallbacks"] == {}


def test_the_memory_of_warnings_is_bounded():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for letters in itertools.product("abcdefgh", repeat=3):
            notices.fallback("".join(letters), "nothing to change", False)
    assert len(caught) == len(notices._warned) == notices._MAX_WARNED


def test_what_takes_long_is_told_once_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(notices, "_told", set())
    for _ in range(2):
        with notices.slow(0.0, "compiling"):
            time.sleep(0.2)
    with notices.slow(60.0, "something quick"):
        pass
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("deberta_kernels", "WARNING", "deberta_kernels: compiling")
    ]
