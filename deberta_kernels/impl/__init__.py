"""Hold the backends, one module each; this file has the rules of precision that they share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["accumulation_dtype", "exact_matmul", "score_factor"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, softmax, lse and gradient sums for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_matmul(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside: it would cast float32 scores back to half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def score_factor(scale: float) -> float:
    """Return what scores are multiplied by before they are formed: the largest power of two up to scale, 2**-16 to 1.

    It is exact, and keeps products of large inputs finite where the scaled score is. The rest, 1 to 2, would round once
    more there, and waits.
    """
    return math.ldexp(1.0, min(0, max(-16, math.frexp(scale)[1] - 1)))
