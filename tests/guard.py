"""Put tensors beside memory that no one may touch, so that one byte too many ends the process.

AddressSanitizer does not see loads of vectors under a mask; the processor does.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

__all__ = ["PLACES", "guarded"]

PLACES = ("start", "end")


def guarded(x: Tensor | None, place: str) -> Tensor | None:
    """Return an equal tensor of the same strides whose memory starts, or ends, at a page that cannot be read.

    Args:
        x: a tensor on the CPU, or None.
        place: one of `PLACES`.
    """
    if x is None or not x.numel():
        return x
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    size, page = count * x.element_size(), mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for wall in (start, start + page + inside):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect refused")
    offset = page if place == "start" else page + inside - size
    plain = torch.frombuffer(memory, dtype=x.dtype, count=count, offset=offset)
    return plain.as_strided(x.shape, x.stride()).copy_(x)
