"""Checks of what an operator was handed: a saved program has arguments as data, and kernels take them for right.

The functional interface has checked its own calls already. The operators of `ops` check everything again, and so does
every backward: what autograd saved may have changed since the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deberta_kernels.checks.arguments import (
    check_call,
    check_device,
    check_dropout,
    check_scale,
    check_storage,
    check_tensor,
    storage_fits,
)
from deberta_kernels.checks.packed import check_cu_seqlens, check_max_seqlen, check_packed
from deberta_kernels.dtypes import accumulation_dtype
from deberta_kernels.position import attention_span, reachable_rows
from deberta_kernels.types import AttentionProblem

__all__ = ["check_gradients", "check_problem", "check_reachable_rows", "check_storages"]

_NAMES = (
    "q", "k", "v", "pos_key", "pos_query", "masks.key", "masks.query", "masks.pair", "seed", "prepared",
)  # fmt: skip


def check_problem(problem: AttentionProblem, *, real: bool) -> AttentionProblem:
    """Check a problem that nobody has checked yet, except for its memory.

    Args:
        problem: the arguments of an operator.
        real: the tensors hold values; False for those that have nothing but shapes.

    Returns:
        the problem; packed sequences get bounds that nobody else can change, and the longest length.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
    """
    q, position, packed = problem.q, problem.position, problem.cu_seqlens is not None
    check_call(q, problem.k, problem.v, problem.pos_key, problem.pos_query, problem.masks, position, packed)
    check_scale(problem.scale)
    check_dropout(problem.dropout_p)
    if problem.seed is not None or problem.dropout_p > 0:
        _check_seed(problem)
    if problem.prepared is not None:
        check_tensor("prepared", problem.prepared)
        check_device("prepared", problem.prepared, q)
    if problem.cu_seqlens is None:
        return problem
    keys = problem.k.shape[2]
    check_packed(q, keys, position.prefix_length)
    check_max_seqlen(problem.max_seqlen)
    cu_seqlens, longest = check_cu_seqlens(problem.cu_seqlens, q, keys, problem.max_seqlen, real)
    return problem.changed(cu_seqlens=cu_seqlens, max_seqlen=longest)


def _check_seed(problem: AttentionProblem) -> None:
    seed = problem.seed
    if seed is None:
        if problem.q.numel() > 0:
            raise ValueError("seed must be given when dropout_p is not 0, got None; use dropout.draw_seed(q.device).")
        return
    check_tensor("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must have dtype int64, got {seed.dtype}; use dropout.draw_seed(q.device).")
    if seed.shape != (1,):
        raise ValueError(f"seed must have shape (1,), got {tuple(seed.shape)}; use dropout.draw_seed(q.device).")
    check_device("seed", seed, problem.q)


def check_reachable_rows(problem: AttentionProblem) -> None:
    """Check that sliced tables hold every row the call can reach: a kernel would read past their end.

    Raises:
        ValueError: one is missing.
    """
    table, position = problem.pos_key if problem.pos_key is not None else problem.pos_query, problem.position
    if table is None:
        return
    rows = table.shape[1]
    if rows == 2 * attention_span(position.position_buckets, position.max_relative_positions):
        return
    if problem.cu_seqlens is None:
        nq, nk = problem.q.shape[2], problem.k.shape[2] - position.prefix_length
    else:
        nq = nk = problem.max_seqlen
    if nq == 0 or nk <= 0:
        return
    start, stop = reachable_rows(nq, nk, position)
    if start < position.first_row or stop > position.first_row + rows:
        raise ValueError(
            f"pos_key and pos_query must hold the rows [{start}, {stop}) of the full table that {nq} queries and {nk} "
            f"keys reach, got {rows} rows from first_row={position.first_row}; slice with position.reachable_rows."
        )


def check_storages(problem: AttentionProblem) -> None:
    """Check that the memory of every tensor is still there; that of cu_seqlens is looked at with its values.

    Raises:
        ValueError: that of one was freed or cut.
    """
    masks = problem.masks
    query_mask = None if masks.query is masks.key else masks.query
    tensors = (
        problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query, masks.key, query_mask, masks.pair,
        problem.seed, problem.prepared,
    )  # fmt: skip
    for x in tensors:
        if x is not None and not storage_fits(x):
            check_storage(_NAMES[next(i for i, other in enumerate(tensors) if other is x)], x)


def check_gradients(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Sequence[bool]
) -> None:
    """Check what a backward takes besides the problem, its memory included.

    Args:
        problem: the problem of the forward.
        dout: (B, H, Nq, D), dtype of q; gradient of out.
        dlse: (B, H, Nq), dtype of lse, or None; gradient of lse.
        out: (B, H, Nq, D), dtype of q; what the forward returned.
        lse: (B, H, Nq) float32 (float64 for float64); what the forward returned.
        needs: whether q, k, v, pos_key and pos_query need a gradient.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: a tensor has a wrong shape or device, or lost its memory; or there are not five needs.
    """
    q = problem.q
    statistics = accumulation_dtype(q.dtype)
    for name, x, shape, dtype in (
        ("dout", dout, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("lse", lse, q.shape[:3], statistics),
        ("dlse", dlse, q.shape[:3], statistics),
    ):
        if x is None:
            continue  # the schema lets dlse alone be None
        check_tensor(name, x)
        if x.dtype is not dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {x.dtype}; pass what belongs to the forward.")
        if x.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}; pass what belongs to the forward."
            )
        check_device(name, x, q)
        check_storage(name, x)
    if len(needs) != 5:
        raise ValueError(
            f"needs must say for q, k, v, pos_key and pos_query whether they need a gradient, got {len(needs)} values; "
            "pass five."
        )
