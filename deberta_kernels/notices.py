"""What users are told: warnings, each once, and counts of what has run."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels.backends import BACKENDS

__all__ = [
    "DebertaKernelsWarning",
    "count_call",
    "fallback",
    "record_fallback",
    "reset_stats",
    "slow",
    "stats",
    "warn_once",
]


class DebertaKernelsWarning(UserWarning):
    """Something the user can change: a slower path than the machine could run, with cause and remedy."""


# Enough for every kind of message there is; a caller who makes up new ones does not fill the memory.
_MAX_WARNED = 256
# A warning points at the nearest caller outside these packages.
_INSIDE = (PACKAGE, "torch", "transformers")

_lock = threading.Lock()
_calls: dict[str, int] = dict.fromkeys(BACKENDS, 0)
_fallbacks: dict[str, int] = {}
_warned: set[str] = set()
_told: set[str] = set()  # by `slow`


def _renew_lock() -> None:
    """Forget the lock in a forked child: a thread that does not exist there may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def count_call(name: str) -> None:
    """Count one forward call that backend `name` computed."""
    with _lock:
        _calls[name] += 1


def record_fallback(reason: str) -> None:
    """Count one call that ran the original code instead of a kernel, for `reason`."""
    with _lock:
        _fallbacks[reason] = _fallbacks.get(reason, 0) + 1


def fallback(reason: str, remedy: str, strict: bool) -> None:
    """Note that a call is about to run the original code: count it, and warn once per reason.

    Args:
        reason: why no kernel runs, a clause without a full stop.
        remedy: what the user can change, a clause without a full stop.
        strict: raise instead.

    Raises:
        NotImplementedError: strict is True; nothing is counted.
    """
    message = f"{reason}; {remedy}."
    if strict:
        raise NotImplementedError(message)
    record_fallback(reason)
    warn_once(f"deberta_kernels runs the original attention code: {message}")


def stats() -> dict[str, dict[str, int]]:
    """Return what has run since import, or since `reset_stats`.

    Returns:
        {"calls": {backend: forward calls it computed}, "fallbacks": {reason: calls that ran the original code}}.
        Calls are counted where they are computed: tracing a call counts nothing, recomputing one in a checkpoint does.
    """
    with _lock:
        return {"calls": dict(_calls), "fallbacks": dict(_fallbacks)}


def reset_stats() -> None:
    """Set every count of `stats` back to zero; warnings already given stay given."""
    with _lock:
        for name in _calls:
            _calls[name] = 0
        _fallbacks.clear()


def warn_once(message: str) -> None:
    """Warn once per kind of message: numbers do not count, since sizes vary without end; nor is the memory endless."""
    kind = re.sub(r"\d+", "#", message)
    with _lock:
        if kind in _warned or len(_warned) >= _MAX_WARNED:
            return
        _warned.add(kind)
    warnings.warn(message, DebertaKernelsWarning, stacklevel=_caller_level())


@contextmanager
def slow(seconds: float, what: str) -> Iterator[None]:
    """Log what is going on, once, when what runs inside takes longer than this."""

    def say() -> None:
        with _lock:
            if what in _told or len(_told) >= _MAX_WARNED:
                return
            _told.add(what)
        logging.getLogger(PACKAGE).warning("%s: %s", PACKAGE, what)

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _caller_level() -> int:
    """Return the stacklevel at which the caller of this function warns at the code that uses the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level
