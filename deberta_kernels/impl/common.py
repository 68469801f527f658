"""What every backend asks of a call: its extent, its masks and position terms, and how refusals are worded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.torch_state import captures
from deberta_kernels.types import AttentionProblem, Gradients

__all__ = [
    "LOG2E",
    "Extent",
    "Needs",
    "device_refusal",
    "dtype_refusal",
    "empty_results",
    "empty_tokens",
    "exact_matmul",
    "extent",
    "has_positions",
    "head_dim_refusal",
    "inputs",
    "masked",
    "mean_value",
    "padded_row_value",
    "positioned_keys",
    "scale_refusal",
    "score_factor",
    "seed_of",
    "sequences",
    "steps",
    "unit_stride",
    "wanted",
    "zero_gradients",
]

# Whether q, k, v, pos_key and pos_query need a gradient.
Needs = tuple[bool, bool, bool, bool, bool]
LOG2E = math.log2(math.e)


class Extent(NamedTuple):
    """The extent of a call, in units that a kernel's grid is made of.

    Attributes:
        samples: of a batch, or packed sequences.
        nq: queries of a sample, or of the longest sequence.
        nk: keys of a sample, or of the longest sequence; prefix keys included.
    """

    samples: int
    nq: int
    nk: int


def extent(problem: AttentionProblem) -> Extent:
    """Return how many samples or packed sequences there are, and their largest numbers of queries and keys."""
    if problem.cu_seqlens is not None:
        return Extent(problem.cu_seqlens.numel() - 1, problem.max_seqlen, problem.max_seqlen)
    return Extent(problem.q.shape[0], problem.q.shape[2], problem.k.shape[2])


def sequences(cu_seqlens: Tensor) -> list[slice]:
    """Return the tokens of each packed sequence; waits for the device.

    Raises:
        CaptureError: a CUDA graph is being captured.
    """
    if not cu_seqlens.is_cpu and captures.capturing(cu_seqlens.device):
        raise captures.CaptureError(
            f"a CUDA graph is being captured on {cu_seqlens.device}, and this backend reads the values of cu_seqlens, "
            "which no capture can; pass backend='triton', or padded sequences."
        )
    bounds = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def positioned_keys(problem: AttentionProblem) -> int:
    """Return how many keys of a sample, or of the longest sequence, have a position; 0 without position tables."""
    if problem.pos_key is None and problem.pos_query is None:
        return 0
    return max(extent(problem).nk - problem.position.prefix_length, 0)


def has_positions(problem: AttentionProblem) -> bool:
    """Return whether any score has a position term: there is a table, and a key behind the prefix."""
    return positioned_keys(problem) > 0


def masked(problem: AttentionProblem) -> bool:
    """Return whether there is a mask, so that some query may have no key to attend to."""
    masks = problem.masks
    return masks.key is not None or masks.query is not None or masks.pair is not None


def inputs(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what a call can be differentiated by, in the order of `Needs` and `Gradients`."""
    return problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query


def wanted(problem: AttentionProblem, needs: Iterable[bool]) -> list[Tensor | None]:
    """Return `inputs`, None in the place of each that needs no gradient."""
    return [x if needed else None for x, needed in zip(inputs(problem), needs, strict=True)]


def zero_gradients(problem: AttentionProblem, needs: Iterable[bool]) -> Gradients:
    """Return the gradients asked for, all zero."""
    return Gradients(*(None if x is None else torch.zeros_like(x) for x in wanted(problem, needs)))


def seed_of(problem: AttentionProblem) -> Tensor:
    """Return the key of the dropout counter.

    Raises:
        ValueError: nobody drew one.
    """
    if problem.seed is None:
        raise ValueError("seed must be given when dropout_p is not 0; use dropout.draw_seed(q.device)")
    return problem.seed


# ---- Memory


def empty_tokens(x: Tensor) -> Tensor:
    """Return uninitialised memory for results of the shape of x, (B, H, N, D), laid out (B, N, H, D).

    It is no view: one takes longer to make, and autograd would remember where it was made.
    """
    _, heads, length, head_dim = x.shape
    strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialised memory for what a forward returns: out, see `empty_tokens`, and lse, (B, H, Nq)."""
    lse = torch.empty(q.shape[:3], dtype=dtypes.accumulation_dtype(q.dtype), device=q.device)
    return empty_tokens(q), lse


def padded_row_value(problem: AttentionProblem) -> Tensor | None:
    """Return what a padded row gets, (B, H, D) float32 contiguous; None without a mask, when there is no such row."""
    return mean_value(problem.v) if masked(problem) else None


def mean_value(v: Tensor) -> Tensor:
    """Return the mean of v over its keys, (B, H, D) float32 contiguous."""
    return v.mean(2, dtype=torch.float32).contiguous()


def steps(x: Tensor) -> list[int]:
    """Return the strides that are stepped along, the last dimension's aside: those of more than one element."""
    return [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1]) if size > 1]


def unit_stride(x: Tensor) -> Tensor:
    """Return x with neighbours in its last dimension side by side in memory, and no negation pending."""
    return x if x.stride(-1) == 1 and not x.is_neg() else x.resolve_neg().contiguous()


# ---- Precision


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


# ---- Refusals: None, or the reason as a clause


def device_refusal(device: torch.device, runs_on: str) -> str | None:
    """Refuse tensors of another type of device."""
    return None if device.type == runs_on else f"it runs on {runs_on} tensors, not {device.type}"


def dtype_refusal(dtype: torch.dtype, computed: Sequence[torch.dtype]) -> str | None:
    """Refuse dtypes that are not among those computed."""
    return None if dtype in computed else f"it computes {dtypes.listed(computed)}, not {dtypes.name(dtype)}"


def head_dim_refusal(head_dim: int, most: int) -> str | None:
    """Refuse heads that are too large."""
    return f"head_dim {head_dim} is more than {most}" if head_dim > most else None


def scale_refusal(scale: float) -> str | None:
    """Refuse scales that turn the largest score into the smallest: an online softmax keeps the largest unscaled one."""
    return "the scale is not positive" if scale <= 0 else None
