"""The functional entry to disentangled attention: what a call means, checked before it runs."""

from __future__ import annotations

import math

from torch import Tensor

from deberta_kernels import dispatch, ops
from deberta_kernels.checks.arguments import (
    check_call,
    check_dropout,
    check_position,
    check_qkv,
    check_scale,
    check_tables,
)
from deberta_kernels.checks.packed import check_cu_seqlens, check_max_seqlen, check_packed
from deberta_kernels.masks import parse_attention_mask
from deberta_kernels.position import attention_span
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = ["disentangled_attention", "disentangled_attention_varlen", "explain", "run_attention"]

_NO_MASKS = Masks()


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    prefix_length: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with content and relative position, as DeBERTa-v2 and v3 do.

    `score[i, j] = scale * (q_i . k_j + q_i . pos_key[delta(i - j)] + k_j . pos_query[delta(i - j)])`, a softmax over
    j, times v, with `delta(x) = clamp(log_bucket(x) + att_span, 0, 2 * att_span - 1)`. Differentiable in q, k, v,
    pos_key and pos_query; the log-sum-exp returned is differentiable as well.

    Args:
        q: (B, H, Nq, D) float32, float16, bfloat16 or float64, any strides, any device.
        k: (B, H, Nk, D), dtype and device of q.
        v: (B, H, Nk, D), dtype and device of q.
        pos_key: (H, 2 * att_span, D), projected relative embeddings as keys; None switches content-to-position off.
        pos_query: (H, 2 * att_span, D), projected relative embeddings as queries; None switches position-to-content
            off.
        attention_mask: None; (B, Nk) bool, True = real token; or (B, 1 or H, Nq, Nk) bool, True = may attend.
            Integers 0 and 1 are taken too; a float mask is refused, since zeros mean "everywhere" where masks are added
            to scores. A query that may attend to nothing gets the mean of v.
        position_buckets: > 0: log buckets, att_span = position_buckets; <= 0: linear, att_span =
            max_relative_positions.
        max_relative_positions: distance, in tokens, at which relative positions saturate.
        prefix_length: leading keys without a position: no bias on them, j counts after them.
        scale: multiplies raw scores, a positive number that is normal in float32; None means
            1 / sqrt(D * (1 + [pos_key given] + [pos_query given])).
        dropout_p: probability in [0, 1) that one attention probability is dropped, seeded from torch's generator.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", or the name of one backend, which then runs or raises.

    Returns:
        out: (B, H, Nq, D), dtype of q; with return_lse also lse: (B, H, Nq) float32 (float64 for float64), natural log.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        NotImplementedError: the backend asked for cannot run this call.

    Source: DeBERTa (arXiv:2006.03654), equation 4, with both position terms at delta(i - j) as the released code of
    microsoft/DeBERTa and Hugging Face transformers has it.
    """
    problem = _fixed_problem(
        q, k, v, pos_key, pos_query, attention_mask, position_buckets, max_relative_positions, prefix_length, scale,
        dropout_p, backend,
    )  # fmt: skip
    out, lse = ops.attention(problem, backend)
    return (out, lse) if return_lse else out


def disentangled_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend inside each of many sequences that are packed one after the other, without padding.

    The formula is that of `disentangled_attention`; tokens attend to their own sequence only, and relative positions
    count inside it.

    Args:
        q: (T, H, D) float32, float16, bfloat16 or float64; T = tokens of all sequences.
        k: (T, H, D), dtype and device of q.
        v: (T, H, D), dtype and device of q.
        pos_key: as in `disentangled_attention`.
        pos_query: as in `disentangled_attention`.
        cu_seqlens: (S + 1,) int32 on the device of q: 0 followed by the running sum of the S lengths; a length may be
            0. On the CPU the values are checked; elsewhere that would wait for the device, and they are trusted.
        max_seqlen: length of the longest sequence, in tokens, or an upper bound of it, however loose.
        position_buckets: as in `disentangled_attention`.
        max_relative_positions: as in `disentangled_attention`.
        scale: as in `disentangled_attention`.
        dropout_p: as in `disentangled_attention`.
        return_lse: also return the log-sum-exp of the scores.
        backend: as in `disentangled_attention`.

    Returns:
        out: (T, H, D), dtype of q; with return_lse also lse: (H, T) float32 (float64 for float64), natural log.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        NotImplementedError: the backend asked for cannot run this call.
    """
    dispatch.check_backend(backend)
    check_qkv(q, k, v, packed=True)
    tokens, heads, _ = q.shape
    position = PositionSpec(position_buckets, max_relative_positions)
    check_position(position, tokens)
    check_tables(pos_key, pos_query, q, heads, 2 * attention_span(position_buckets, max_relative_positions))
    check_max_seqlen(max_seqlen)
    cu_seqlens, max_seqlen = check_cu_seqlens(cu_seqlens, q, tokens, max_seqlen)
    problem = AttentionProblem(
        _heads_first(q), _heads_first(k), _heads_first(v), pos_key, pos_query, _NO_MASKS, position,
        _default_scale(q, pos_key, pos_query) if scale is None else check_scale(scale), check_dropout(dropout_p), None,
        cu_seqlens, max_seqlen,
    )  # fmt: skip
    out, lse = ops.attention(problem, backend)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    prefix_length: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> dispatch.Explanation:
    """Say which backend `disentangled_attention` would run for the same arguments, and why each other one would not.

    Args:
        q: as in `disentangled_attention`, like every argument here; nothing is computed.
        k: as there.
        v: as there.
        pos_key: as there.
        pos_query: as there.
        attention_mask: as there.
        position_buckets: as there.
        max_relative_positions: as there.
        prefix_length: as there.
        scale: as there.
        dropout_p: as there.
        return_lse: as there; every backend can return it.
        backend: as there.

    Returns:
        An object with `chosen`, a name or None, and `reasons`, {backend: why not}; `str()` of it is readable.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
    """
    problem = _fixed_problem(
        q, k, v, pos_key, pos_query, attention_mask, position_buckets, max_relative_positions, prefix_length, scale,
        dropout_p, backend,
    )  # fmt: skip
    return dispatch.explain(problem, backend)


def run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    *,
    masks: Masks,
    position: PositionSpec,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    strict: bool = False,
    prepared: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with parsed masks and, perhaps, sliced tables: the door for modules.

    Args:
        q: (B, H, Nq, D); (1, H, T, D) with cu_seqlens.
        k: (B, H, Nk, D); (1, H, T, D) with cu_seqlens.
        v: shape of k.
        pos_key: (H, rows, D), rows `position.first_row ...` of the full table, or None.
        pos_query: (H, rows, D), the same rows, or None.
        masks: parsed masks; all None with cu_seqlens.
        position: how distances become rows.
        scale: as in `disentangled_attention`.
        dropout_p: as in `disentangled_attention`.
        cu_seqlens: (S + 1,) int32, or None; then B = 1 and Nq = Nk = T.
        max_seqlen: upper bound of the sequence lengths, in tokens; needed with cu_seqlens only.
        return_lse: also return lse, (B, H, Nq).
        backend: as in `disentangled_attention`.
        strict: raise where "auto" takes a slower backend because a faster one was refused; compiled code only warns.
        prepared: what `prepare` of the backend that runs returned for exactly these tables, or None.

    Returns:
        out: (B, H, Nq, D) view of memory laid out (B, Nq, H, D); with return_lse also lse.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        NotImplementedError: the backend asked for cannot run this call.
    """
    check_call(q, k, v, pos_key, pos_query, masks, position, cu_seqlens is not None)
    keys = k.shape[2]
    if cu_seqlens is None:
        max_seqlen = max(q.shape[2], keys)
    else:
        check_packed(q, keys, position.prefix_length)
        check_max_seqlen(max_seqlen)
        cu_seqlens, max_seqlen = check_cu_seqlens(cu_seqlens, q, keys, max_seqlen or 0)
    problem = AttentionProblem(
        q, k, v, pos_key, pos_query, masks, position,
        _default_scale(q, pos_key, pos_query) if scale is None else check_scale(scale), check_dropout(dropout_p), None,
        cu_seqlens, max_seqlen or 0, prepared,
    )  # fmt: skip
    out, lse = ops.attention(problem, backend, strict=strict)
    return (out, lse) if return_lse else out


def _fixed_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    attention_mask: Tensor | None,
    position_buckets: int,
    max_relative_positions: int,
    prefix_length: int,
    scale: float | None,
    dropout_p: float,
    backend: str,
) -> AttentionProblem:
    dispatch.check_backend(backend)
    position = PositionSpec(position_buckets, max_relative_positions, 0, prefix_length)
    check_call(q, k, v, pos_key, pos_query, _NO_MASKS, position, packed=False, full=True)
    batch, heads, nq, _ = q.shape
    nk = k.shape[2]
    masks = _NO_MASKS
    if attention_mask is not None:
        masks = parse_attention_mask(attention_mask, batch=batch, heads=heads, nq=nq, nk=nk, device=q.device)
    return AttentionProblem(
        q, k, v, pos_key, pos_query, masks, position,
        _default_scale(q, pos_key, pos_query) if scale is None else check_scale(scale), check_dropout(dropout_p), None,
        None, max(nq, nk),
    )  # fmt: skip


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # (T, H, D) -> (1, H, T, D), a view


def _default_scale(q: Tensor, pos_key: Tensor | None, pos_query: Tensor | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1] * (1 + (pos_key is not None) + (pos_query is not None)))
