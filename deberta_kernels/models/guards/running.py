"""Calls under way, which end in the world they began in: nothing is undone under an encoder that a thread is running.

A patched encoder hands its attention modules what only they understand. While `unpatch` changes them, new calls of the
encoder run the original code, and those under way are waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["begin", "end", "paused"]

_PATIENCE = 300  # seconds; far longer than forwards take, so that a thread that waits for us is noticed
_condition = threading.Condition()
_running: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()  # encoder -> threads, once for each call
_pauses: list[set[int] | None] = []  # modules that are being changed, by id; None: all
_pausing: set[int] = set()  # threads that wait, and so cannot end the calls they are inside of


def begin(encoder: nn.Module) -> bool:
    """Begin a call of an encoder in its patched form; False where it has to run the original code."""
    with _condition:
        threads = _running.setdefault(encoder, [])
        me = threading.get_ident()
        if me not in threads and any(modules is None or id(encoder) in modules for modules in _pauses):
            return False
        threads.append(me)
        return True


def end(encoder: nn.Module) -> None:
    """End a call that has begun."""
    with _condition:
        _running[encoder].remove(threading.get_ident())
        if _pauses:
            _condition.notify_all()


@contextmanager
def paused(modules: Sequence[nn.Module] | None) -> Iterator[None]:
    """Wait until no other thread runs one of some modules, or any, in its patched form, and let none begin.

    A thread that is inside such a call itself goes on: what is handed to each layer is decided just before it.

    Raises:
        RuntimeError: a call did not end.
    """
    ids = None if modules is None else {id(module) for module in modules}
    me = threading.get_ident()

    def is_busy() -> bool:
        calls = [threads for encoder, threads in _running.items() if ids is None or id(encoder) in ids]
        return any(thread not in _pausing for threads in calls for thread in threads)

    with _condition:
        _pauses.append(ids)
        _pausing.add(me)
    try:
        with _condition:
            if not _condition.wait_for(lambda: not is_busy(), _PATIENCE):
                raise RuntimeError(
                    f"unpatch() waited {_PATIENCE} s for a forward of another thread, and changed nothing; call it "
                    "when none is under way, and not from a thread that a forward waits for."
                )
        yield
    finally:
        with _condition:
            _pauses.remove(ids)
            _pausing.discard(me)
            _condition.notify_all()


def _start_anew() -> None:
    """Forget the calls of threads that a forked child does not have."""
    global _condition
    _condition = threading.Condition()
    me = threading.get_ident()
    for encoder, threads in list(_running.items()):
        _running[encoder] = [thread for thread in threads if thread == me]
    _pauses.clear()
    _pausing.clear()


os.register_at_fork(after_in_child=_start_anew)
