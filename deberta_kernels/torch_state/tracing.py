"""Questions about modules while torch.compile traces: an answer becomes a constant of the compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["answered_once", "traces_questions"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
# From here on the tracer passes modules to such functions; older ones trace into them, and cannot.
_ASKABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def answered_once(function: _Function) -> _Function:
    """Let the tracer call a function as it is and keep its answer; called elsewhere, it is what it was.

    What `torch.compiler.assume_constant_result` does; calling that would import the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traces_questions() -> bool:
    """Tell whether a tracer is at work that cannot call functions `answered_once` with a module."""
    return not _ASKABLE and torch.compiler.is_compiling()
