"""No compilation while a CUDA graph is captured: Triton compiles at a launch what it has not compiled before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from triton import knobs

from deberta_kernels.torch_state import captures

__all__ = ["compiled_before"]


def compiled_before(device: torch.device) -> AbstractContextManager[None]:
    """Raise a `CaptureError` inside, before Triton compiles and loads a kernel into a capture, which would end it.

    The kernels of a call are compiled when its backend is chosen. What a backward inside compiled code needs is known
    only when it runs, for tensors there say nothing of gradients.
    """
    return _refusing(device) if captures.capturing(device) else nullcontext()


@contextmanager
def _refusing(device: torch.device) -> Iterator[None]:
    before = knobs.runtime.jit_cache_hook

    # For all threads; one that captures nothing may compile as it likes.
    def refuse(*arguments: Any, **named: Any) -> Any:
        captures.check_not_capturing(device, "compile and load a Triton kernel")
        return None if before is None else before(*arguments, **named)

    knobs.runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
