"""What is compiled and loaded once, and how long a failure to do so is believed.

A device may be out of memory, a disk full or a compiler killed at the very moment; the same attempt succeeds later. A
compiler may also fail on a kernel for good, after many seconds. So a failure is believed for so long that repeating the
attempt takes a small share of the time, and not at all at first where its cause lies around the attempt.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from deberta_kernels.torch_state.captures import CaptureError

__all__ = ["Attempts", "FailedError", "LastingError", "cause_of", "is_passing"]

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")

# Failures of passing causes that are tried again at the very next call; the memory may be free then.
_AT_ONCE = 2
# After that, the pause as a multiple of the time a failure took: a tenth of the time at most goes into attempts that
# may succeed. Into those that hardly will goes a hundredth, and a hundredth of that with every further failure.
_PAUSE_OF_PASSING, _PAUSE_OF_OTHERS = 10, 100
_SHORTEST_PAUSE = 1.0  # seconds
_MOST_GROWTH = 5
# What ends a compiler that is at fault itself; any other signal came from somebody else.
_OWN_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
# What the system cannot do at one time and can at another: memory, disk, open files, interruptions.
_OF_THE_MOMENT = (
    errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.EIO,
    errno.EBUSY, errno.ETXTBSY, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip
_TEXT = 200  # characters of a cause that is told


class FailedError(RuntimeError):
    """What was asked for could not be made; the message says why.

    Attributes:
        passing: a later attempt may succeed.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class LastingError(FailedError):
    """A failure that no other attempt changes: the device or the version is not the right one."""


class _Failure(NamedTuple):
    reason: str
    passing: bool
    number: int  # of failures in a row
    again: float  # time of the next attempt, monotonic, in seconds


class Attempts(Generic[Key, Made]):
    """What has been made, by key, and what could not be."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing.

        Args:
            clock: returns the time in seconds.
        """
        self._made: dict[Key, Made] = {}
        self._failures: dict[Key, _Failure] = {}
        self._lock = threading.RLock()
        self._clock = clock

    def get(self, key: Key, make: Callable[..., Made], *arguments: Any) -> Made:
        """Return what `make(*arguments)` made for the key, now or before; one thread makes it, the others wait.

        Raises:
            FailedError: it cannot be made, or could not and is not tried again yet. Errors that are no `Exception`, as
                of Ctrl-C, pass through and are not kept.
        """
        try:
            return self._made[key]
        except KeyError:
            pass
        with self._lock:
            if key in self._made:
                return self._made[key]
            failure = self._failures.get(key)
            if failure is None or self._clock() >= failure.again:
                failure = self._attempt(key, failure, make, arguments)
            if failure is None:
                return self._made[key]
        raise FailedError(failure.reason, failure.passing)

    def believed(self, key: Key) -> str | None:
        """Return the failure for which the key is not tried again yet; None where the next `get` tries."""
        failure = self._failures.get(key)
        return failure.reason if failure is not None and self._clock() < failure.again else None

    def _attempt(
        self, key: Key, before: _Failure | None, make: Callable[..., Made], arguments: tuple[Any, ...]
    ) -> _Failure | None:
        """Try to make something; keep it, or keep and return the failure."""
        start = self._clock()
        try:
            self._made[key] = make(*arguments)
        except CaptureError:
            raise  # for the caller to know: another backend would be captured in its place
        except Exception as error:  # compilers raise errors of many kinds, and for none of them a call must fail
            passing, end = is_passing(error), self._clock()
            number = before.number + 1 if before is not None else 1
            if isinstance(error, LastingError):
                pause = float("inf")
            elif passing:
                pause = max(_SHORTEST_PAUSE, _PAUSE_OF_PASSING * (end - start)) if number > _AT_ONCE else 0.0
            else:
                pause = max(_SHORTEST_PAUSE, _PAUSE_OF_OTHERS ** min(number, _MOST_GROWTH) * (end - start))
            self._failures[key] = _Failure(str(error), passing, number, end + pause)
            return self._failures[key]
        self._failures.pop(key, None)
        return None


def is_passing(error: BaseException) -> bool:
    """Tell whether a failure lies around what was tried: memory, disk, files, a process that was killed, the device."""
    return not isinstance(error, LastingError) and any(_is_around(cause) for cause in _chain(error))


def cause_of(error: BaseException) -> str:
    """Return a short text about an error: the first of its causes that `is_passing`, else the error itself.

    File names of one process are left out: a warning is given once per text.
    """
    cause = next(filter(_is_around, _chain(error)), error)
    if isinstance(cause, subprocess.CalledProcessError):
        return f"the compiler was ended by signal {_signal_of(cause)}"
    text = cause.strerror if isinstance(cause, OSError) else str(cause)
    lines = [line for line in str(text or "").strip().splitlines() if not line.startswith("Repro command")]
    return f"{type(cause).__name__}: {lines[-1].strip()[:_TEXT] if lines else ''}"


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and what it was raised from, or while handling what."""
    found: list[BaseException] = []
    pending: BaseException | None = error
    while pending is not None and pending not in found:
        found.append(pending)
        pending = pending.__cause__ or pending.__context__
    return found


def _is_around(error: BaseException) -> bool:
    if isinstance(error, subprocess.CalledProcessError):
        return _signal_of(error) not in (0, *_OWN_FAULTS)
    if isinstance(error, OSError):
        return error.errno in _OF_THE_MOMENT
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
        return True
    return bool(getattr(error, "passing", False))


def _signal_of(error: subprocess.CalledProcessError) -> int:
    """Return what ended a process, as Python or a shell reports it; 0: it ended itself."""
    status = int(error.returncode)
    return -status if status < 0 else status - 128 if 128 < status < 128 + signal.NSIG else 0
