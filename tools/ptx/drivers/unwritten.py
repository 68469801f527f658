"""Memory that nobody has written: what torch.empty and its kin return, filled with what the machine takes for that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_uint8, c_uint16
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._device

from ptx.build import library

__all__ = ["new_memory_is_unwritten", "pattern"]

_FACTORIES = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
)  # fmt: skip


def pattern() -> int:
    """Return what unwritten memory holds, by 2 bytes: kUnwritten of cpp/global_memory.h."""
    return c_uint16.in_dll(library(), "ptx_unwritten").value


@contextmanager
def new_memory_is_unwritten() -> Iterator[None]:
    """Mark what is allocated meanwhile as unwritten.

    The mark is the content: it goes when a kernel or the host writes, and stays between the launches of a call.
    """
    # torch.device as a context knows what makes tensors by the functions themselves, from its first use on.
    torch.utils._device._device_constructors()
    with ExitStack() as stack:
        for owner, name in _FACTORIES:
            stack.enter_context(mock.patch.object(owner, name, _marking(getattr(owner, name))))
        yield


def _marking(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*arguments: Any, **more: Any) -> torch.Tensor:
        tensor = make(*arguments, **more)
        # Fake and traced tensors have no memory.
        if not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.device.type == "cpu":
            _fill(tensor.untyped_storage())
        return tensor

    return made


def _fill(storage: torch.UntypedStorage) -> None:
    size = storage.nbytes()
    if size:
        memory = np.frombuffer((c_uint8 * size).from_address(storage.data_ptr()), np.uint8)
        memory[0::2], memory[1::2] = pattern() & 255, pattern() >> 8
