"""The peak memory of training: by the device's allocator, or the resident set of this process."""

from __future__ import annotations

import resource
from contextlib import suppress

import torch

from deberta_kernels.testing import memory

__all__ = ["Memory"]


class Memory:
    """The peak of memory from now on, beyond what is held now: gradients, optimizer and what backward needs."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):  # Linux can
            memory.reset_high_water()
        self._before = _highest()

    def peak(self) -> int:
        """Return bytes."""
        return (torch.cuda.max_memory_allocated() if self._cuda else _highest()) - self._before


def _highest() -> int:
    with suppress(RuntimeError):
        return memory.status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
