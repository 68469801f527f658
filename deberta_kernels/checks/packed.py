"""Checks of packed sequences: their bounds, which kernels use as addresses, and how long they may be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.checks.arguments import check_device, check_int, check_storage, check_tensor
from deberta_kernels.torch_state.modes import values_readable

__all__ = ["check_cu_seqlens", "check_max_seqlen", "check_packed"]

_MOST_TOKENS = 2**31 - 1  # cu_seqlens is int32


def check_packed(q: Tensor, keys: int, prefix_length: int) -> None:
    """Check that unpadded sequences lie in one row, and that no key is without a position.

    Raises:
        ValueError: they do not.
    """
    if q.shape[0] != 1 or q.shape[2] != keys:
        raise ValueError(
            f"q and k must have shape (1, H, T, D) with cu_seqlens, got {tuple(q.shape)} and {keys} keys; "
            "pack the sequences."
        )
    if prefix_length:
        raise ValueError(f"prefix_length must be 0 with cu_seqlens, got {prefix_length}; pack without a prefix.")


def check_max_seqlen(max_seqlen: Any) -> None:
    """Check that `max_seqlen` can be a number of tokens.

    Raises:
        TypeError: it is not an int.
        ValueError: it is negative.
    """
    check_int("max_seqlen", max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}; pass the length of the longest sequence.")


def check_cu_seqlens(
    cu_seqlens: Tensor, q: Tensor, tokens: int, max_seqlen: int, real: bool | None = None
) -> tuple[Tensor, int]:
    """Check the bounds of packed sequences, and return what a kernel may rely on.

    Args:
        cu_seqlens: (S + 1,) int32: sequence s holds the tokens [cu_seqlens[s], cu_seqlens[s + 1]).
        q: the queries, whose device it shares.
        tokens: T, tokens of all sequences.
        max_seqlen: upper bound of the lengths, in tokens.
        real: whether its values exist now; None finds out.

    Returns:
        cu_seqlens: on the CPU a copy, the very one whose values were checked: NumPy or another thread may still change
            the caller's. Elsewhere its values are trusted, and it is returned itself.
        max_seqlen: the longest length where the values were read, else at most T.

    Raises:
        TypeError: cu_seqlens is not an int32 tensor.
        ValueError: its shape or device does not fit, or its values where they can be read without waiting for a device.
    """
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype int32, got {dtypes.name(cu_seqlens.dtype)}; cast it with .int().")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must have shape (S + 1,) for S sequences, got {tuple(cu_seqlens.shape)}; "
            "it holds 0 followed by the running sum of the lengths."
        )
    check_device("cu_seqlens", cu_seqlens, q)
    check_storage("cu_seqlens", cu_seqlens)
    if cu_seqlens.device.type != "cpu" or not (values_readable(cu_seqlens) if real is None else real):
        known = type(max_seqlen) is int
        limit = tokens if known and type(tokens) is int else _MOST_TOKENS  # a symbolic size is compared when it runs
        return cu_seqlens, min(max_seqlen, limit) if known else max_seqlen
    own = cu_seqlens.clone()
    return own, _check_bounds(own.tolist(), tokens, max_seqlen)


def _check_bounds(bounds: list[int], tokens: int, max_seqlen: int) -> int:
    """Check the values of cu_seqlens; return the longest length."""
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}; put 0 before the running sum of lengths.")
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if lengths and min(lengths) < 0:
        at = lengths.index(min(lengths))
        raise ValueError(
            f"cu_seqlens must not fall, got {bounds[at]} followed by {bounds[at + 1]} at index {at}; "
            "it holds 0 followed by the running sum of the lengths."
        )
    if bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must end at T = {tokens}, the number of tokens of q, got {bounds[-1]}; "
            "check that the lengths add up."
        )
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least {longest}, the longest sequence of cu_seqlens, got {max_seqlen}; "
            "pass the length of the longest sequence."
        )
    return longest
