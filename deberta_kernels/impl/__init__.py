"""Hold the backends, one module each; this file has the two rules of precision that they share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["accumulation_dtype", "exact_matmul"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, softmax, lse and gradient sums for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_matmul(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside: it would cast float32 scores back to half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
