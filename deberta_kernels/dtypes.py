"""The floating-point dtypes of the package and what they are called; below everything else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["FLOATS", "KERNEL_FLOATS", "SHORT_NAMES", "accumulation_dtype", "listed", "name", "short_name"]

# What kernels compute. The PyTorch backends also take float64, which the reference is held to.
KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*KERNEL_FLOATS, torch.float64)
# As test ids, tables and the names of compiled kernels have them.
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def name(dtype: torch.dtype | torch.layout) -> str:
    """Return a dtype's name without the module, as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def short_name(dtype: torch.dtype) -> str:
    """Return a floating-point dtype's short name, as "bf16"."""
    return SHORT_NAMES[dtype]


def listed(dtypes: Sequence[torch.dtype], last: str = "and") -> str:
    """Return names as in a sentence: "float32, bfloat16 and float16"."""
    names = [name(dtype) for dtype in dtypes]
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, softmax, lse and gradient sums for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
