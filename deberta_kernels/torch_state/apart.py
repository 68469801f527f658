"""A thread of its own for work that nothing may reach which the caller has set for its thread.

That is autocast, modes of gradients and inference, functions and dispatch, transforms, hooks on saved tensors, a
default device, a stream, and memory that allocations go to: a CUDA graph's, or that of `torch.cuda.use_mem_pool`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["ThreadError", "apart"]

_Result = TypeVar("_Result")


class ThreadError(RuntimeError):
    """The system has no more threads, or Python is about to end."""


def apart(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a function in a thread of its own; return its result, or raise its error.

    Raises:
        ThreadError: there is none to be had.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function(*arguments))
        except BaseException as error:  # raised again where it was asked for
            errors.append(error)

    thread = threading.Thread(target=run, name=f"deberta_kernels {function.__name__}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadError(str(error)) from error
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
