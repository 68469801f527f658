"""Attention exactly as Hugging Face's eager code computes it: the yardstick of the error budget, not the truth.

Every rounding of the original is kept: K is divided by the scale first, c2p and p2c stay unscaled in the activation
dtype and are divided afterwards, masked scores become finfo.min, and the softmax runs in the activation dtype. So it
overflows in float16 where the original does.

Source:
    `DisentangledSelfAttention.forward` of transformers v5.23.0, models/deberta_v2/modeling_deberta_v2.py. Differences:
    it takes projected tables; Nq and Nk may differ; prefix keys have no bias; dropout follows `dropout.keep_mask`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from deberta_kernels import dropout
from deberta_kernels.types import AttentionProblem

__all__ = ["attention", "divisor"]


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Run one problem in the order and precision of the original, differentiably.

    Args:
        problem: any dtype; packed sequences become a block-diagonal mask.

    Returns:
        out: (B, H, Nq, D), dtype of q.
        lse: (B, H, Nq) float32 (float64 for float64), of the scores in the activation dtype; -inf on padded rows.
    """
    batch, heads, nq, head_dim = problem.q.shape
    nk = problem.k.shape[2]
    q, k, v = (x.reshape(batch * heads, -1, head_dim) for x in (problem.q, problem.k, problem.v))
    scale = divisor(problem.scale).to(dtype=q.dtype, device=q.device)
    scores = torch.bmm(q, k.transpose(-1, -2) / scale)
    bias = _position_bias(problem, q, k, scale)
    if bias is not None:
        scores = scores + bias
    scores = scores.view(batch, heads, nq, nk)
    keep = _allowed(problem)
    if keep is not None:
        scores = scores.masked_fill(~keep, torch.finfo(q.dtype).min)
    probabilities = torch.softmax(scores, dim=-1)
    padded_row = None if keep is None else ~keep.any(dim=-1, keepdim=True)
    if problem.dropout_p > 0:
        probabilities = probabilities * _dropout_noise(problem, padded_row)
    out = torch.bmm(probabilities.reshape(batch * heads, nq, nk), v).view(batch, heads, nq, head_dim)
    exact = scores if scores.dtype == torch.float64 else scores.float()
    lse = torch.logsumexp(exact, dim=-1)
    if padded_row is not None:
        lse = lse.masked_fill(padded_row[..., 0], float("-inf"))
    return out, lse


def divisor(scale: float) -> Tensor:
    """Return what the original divides by, sqrt(D * factor) in float32, given the inverse of that root."""
    return torch.sqrt(torch.tensor(scale**-2, dtype=torch.float32))


def _position_bias(problem: AttentionProblem, q: Tensor, k: Tensor, scale: Tensor) -> Tensor | None:
    """Return the c2p and p2c scores, (B * H, Nq, Nk), each divided by the scale; None without tables."""
    if problem.pos_key is None and problem.pos_query is None:
        return None
    nq, nk = q.shape[1], k.shape[1]
    rows, positioned = _rows(problem, nq, nk)  # (Nq, Nk), (Nk,)
    index = rows.expand(q.shape[0], nq, nk)
    bias: Tensor | None = None
    if problem.pos_key is not None:
        pos_key = problem.pos_key.repeat(problem.q.shape[0], 1, 1)
        bias = torch.gather(torch.bmm(q, pos_key.transpose(-1, -2)), -1, index) / scale
    if problem.pos_query is not None:
        pos_query = problem.pos_query.repeat(problem.q.shape[0], 1, 1)
        p2c = torch.gather(torch.bmm(k, pos_query.transpose(-1, -2)), -1, index.transpose(-1, -2))
        p2c = p2c.transpose(-1, -2) / scale
        bias = p2c if bias is None else bias + p2c
    assert bias is not None
    return bias if problem.position.prefix_length == 0 else bias.masked_fill(~positioned, 0.0)


def _rows(problem: AttentionProblem, nq: int, nk: int) -> tuple[Tensor, Tensor]:
    """Return the row of the tables given for every query and key, and which keys have a position at all."""
    spec = problem.position
    device = problem.q.device
    table = problem.pos_key if problem.pos_key is not None else problem.pos_query
    assert table is not None
    key_position = torch.arange(nk) - spec.prefix_length
    distance = torch.arange(nq)[:, None] - key_position[None, :]
    span = spec.position_buckets if spec.position_buckets > 0 else spec.max_relative_positions
    if spec.position_buckets > 0 and spec.max_relative_positions > 0:
        distance = _bucketed(distance, spec.position_buckets, spec.max_relative_positions)
    rows = torch.clamp(distance.to(torch.long) + span, 0, 2 * span - 1) - spec.first_row
    positioned = key_position >= 0
    # Prefix keys and pairs of different packed sequences may point outside a sliced table: nobody uses their bias.
    rows = torch.where(positioned, rows, torch.zeros_like(rows))
    if problem.cu_seqlens is not None:
        rows = rows.clamp(0, table.shape[1] - 1)
    return rows.to(device), positioned.to(device)


def _bucketed(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Compute the float32 log bucket with the original's operations, in the original's order."""
    half = buckets // 2
    near = (distance < half) & (distance > -half)
    size = torch.where(near, torch.tensor(half - 1).type_as(distance), torch.abs(distance))
    steps = torch.log(size / half) / torch.log(torch.tensor((furthest - 1) / half)) * (half - 1)
    far = torch.ceil(steps) + half
    return torch.where(size <= half, distance.type_as(far), far * torch.sign(distance))


def _allowed(problem: AttentionProblem) -> Tensor | None:
    """Return (B, 1 or H, Nq, Nk) bool, True = may attend; None when nothing is masked."""
    batch, _, nq, _ = problem.q.shape
    nk = problem.k.shape[2]
    keep: Tensor | None = None
    if problem.cu_seqlens is not None:
        sequence = _sequence_of_token(problem.cu_seqlens)
        return (sequence[:, None] == sequence[None, :])[None, None]
    masks = problem.masks
    if masks.pair is not None:
        keep = masks.pair
    if masks.key is not None:
        keep = masks.key[:, None, None, :] & (True if keep is None else keep)
    if masks.query is not None:
        keep = masks.query[:, None, :, None] & (True if keep is None else keep)
    return None if keep is None else keep.expand(batch, -1, nq, nk)


def _sequence_of_token(cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def _dropout_noise(problem: AttentionProblem, padded_row: Tensor | None) -> Tensor:
    """Return what dropout multiplies the probabilities by, (B, H, Nq, Nk) in the activation dtype."""
    batch, heads, nq, _ = problem.q.shape
    nk = problem.k.shape[2]
    assert problem.seed is not None
    p = problem.dropout_p
    if problem.cu_seqlens is None:
        keep = dropout.keep_mask(problem.seed, p, range(batch * heads), range(nq), range(nk))
        keep = keep.view(batch, heads, nq, nk)
    else:
        keep = torch.ones(batch, heads, nq, nk, dtype=torch.bool, device=problem.q.device)
        bounds = problem.cu_seqlens.tolist()
        for number, (start, stop) in enumerate(pairwise(bounds)):
            local = range(stop - start)
            block = dropout.keep_mask(problem.seed, p, range(number * heads, (number + 1) * heads), local, local)
            keep[0, :, start:stop, start:stop] = block
    noise = keep.to(problem.q.dtype) * dropout.keep_scale(p)
    return noise if padded_row is None else torch.where(padded_row, torch.ones_like(noise), noise)
