"""Disentangled attention as the paper writes it: the specification of every other backend.

Plain PyTorch that autograd differentiates, with all Nq x Nk scores in memory. When a kernel and this file disagree,
the kernel is wrong until proven otherwise.

Source:
    P. He, X. Liu, J. Gao, W. Chen: DeBERTa (2021), equations 2 to 4, and `DisentangledSelfAttention` of transformers
    v5.23.0. Differences from the paper: both position terms use delta(i - j), as the released models do. Differences
    from transformers: scores are float32 (float64 for float64 inputs), masked scores are -inf.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deberta_kernels.dropout import keep_mask, keep_scale
from deberta_kernels.dtypes import accumulation_dtype
from deberta_kernels.impl.common import Needs, exact_matmul, seed_of, sequences, wanted
from deberta_kernels.masks import allowed
from deberta_kernels.position import delta
from deberta_kernels.types import AttentionProblem, Gradients

__all__ = ["attention", "backward", "forward", "refusal"]


def refusal(problem: AttentionProblem) -> str | None:
    """Return None: this backend runs every problem."""
    return None


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Attend by the disentangled scores: out = dropout(softmax(score)) v.

    score[i, j] = scale * (q_i . k_j + q_i . pos_key[delta(i - j)] + k_j . pos_query[delta(i - j)]).

    Args:
        problem: see `AttentionProblem`. Gradients flow to q, k, v, pos_key and pos_query.

    Returns:
        out: (B, H, Nq, D), dtype of q, a view of (B, Nq, H, D) memory.
        lse: (B, H, Nq) float32 (float64 for float64 inputs); natural log of the sum of exp(score), before dropout.
    """
    with exact_matmul(problem.q.device):
        dtype = accumulation_dtype(problem.q.dtype)
        q, k, v = (x.to(dtype) for x in _without_padding(problem))
        # Scaled before they are multiplied, as in transformers: large inputs stay finite.
        scaled_q = problem.scale * q
        score = scaled_q @ k.mT + _position_score(problem, scaled_q, problem.scale * k)

        keep = allowed(problem)
        if keep is None:
            keep = score.new_ones(score.shape, dtype=torch.bool)
        padded_row = ~keep.any(-1, keepdim=True)
        # The zeros keep softmax and its gradient finite on rows that the padded-row rule replaces below.
        score = score.masked_fill(~keep, float("-inf")).masked_fill(padded_row, 0.0)
        lse = score.logsumexp(-1).masked_fill(padded_row.squeeze(-1), float("-inf"))
        probability = score.softmax(-1)
        if problem.dropout_p > 0 and probability.numel() > 0:  # no seed is drawn for nothing
            probability = probability * _kept(problem) * keep_scale(problem.dropout_p)
        mean = problem.v.to(dtype).mean(2, keepdim=True)
        out = torch.where(padded_row, mean, probability @ v)
        return out.to(problem.q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _without_padding(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v with masked tokens at zero, so that a NaN in padding stays there."""
    q, k, v = problem.q, problem.k, problem.v
    if problem.masks.query is not None:
        q = q.masked_fill(~problem.masks.query[:, None, :, None], 0.0)
    if problem.masks.key is not None:
        padding = ~problem.masks.key[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    return q, k, v


def _position_score(problem: AttentionProblem, q: Tensor, k: Tensor) -> Tensor:
    """Return content-to-position plus position-to-content, (B, H, Nq, Nk), zero on prefix keys."""
    nq, nk = q.shape[2], k.shape[2]
    result = q.new_zeros(q.shape[0], q.shape[1], nq, nk)
    query_position = torch.arange(nq, device=q.device)[:, None]
    key_position = torch.arange(nk, device=q.device) - problem.position.prefix_length
    distance = query_position - key_position
    if problem.cu_seqlens is not None:
        # Distances between sequences are masked, and may lie outside a table cut to the longest sequence.
        distance = distance.clamp(1 - problem.max_seqlen, problem.max_seqlen - 1)
    has_position = key_position >= 0
    row = torch.where(has_position, delta(distance, problem.position) - problem.position.first_row, 0)
    row = row.expand(q.shape[0], q.shape[1], nq, nk)
    if problem.pos_key is not None:
        c2p = q @ problem.pos_key.to(q.dtype).mT
        result = result + c2p.gather(-1, row)
    if problem.pos_query is not None:
        p2c = k @ problem.pos_query.to(k.dtype).mT
        result = result + p2c.gather(-1, row.mT).mT
    return torch.where(has_position, result, 0.0)


def _kept(problem: AttentionProblem) -> Tensor:
    """Return the dropout mask, (B, H, Nq, Nk) bool; with packed sequences only pairs inside one sequence matter."""
    seed = seed_of(problem)
    batch, heads, nq, _ = problem.q.shape
    nk = problem.k.shape[2]
    if problem.cu_seqlens is None:
        kept = keep_mask(seed, problem.dropout_p, range(batch * heads), range(nq), range(nk))
        return kept.view(batch, heads, nq, nk)
    kept = torch.zeros(1, heads, nq, nk, dtype=torch.bool, device=problem.q.device)
    for sequence, tokens in enumerate(sequences(problem.cu_seqlens)):
        inside = range(tokens.stop - tokens.start)
        batch_heads = range(sequence * heads, (sequence + 1) * heads)
        kept[0, :, tokens, tokens] = keep_mask(seed, problem.dropout_p, batch_heads, inside, inside)
    return kept


@torch.no_grad()
def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Run `attention` without recording gradients, as every backend's forward does."""
    return attention(problem)


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    """Differentiate `attention` by autograd, with the signature of every backend's backward.

    Args:
        problem: the problem of the forward.
        dout: (B, H, Nq, D), dtype of q, any strides; gradient of out.
        dlse: (B, H, Nq), dtype of lse, or None; gradient of lse.
        out: unused, recomputed.
        lse: unused, recomputed.
        needs: whether q, k, v, pos_key, pos_query need a gradient.
    """
    names = ("q", "k", "v", "pos_key", "pos_query")
    leaves: dict[str, Any] = {
        name: tensor.detach().requires_grad_()
        for name, tensor in zip(names, wanted(problem, needs), strict=True)
        if tensor is not None
    }
    if not leaves:
        return Gradients(None, None, None, None, None)
    with torch.enable_grad():
        result = attention(replace(problem, **leaves))
    outputs, cotangents = list(result), [dout, dlse if dlse is not None else torch.zeros_like(result[1])]
    if not result[1].requires_grad:
        outputs, cotangents = outputs[:1], cotangents[:1]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = dict(zip(leaves, grads, strict=True))
    return Gradients(
        *(
            (torch.zeros_like(leaves[name]) if found[name] is None else found[name]) if name in found else None
            for name in names
        )
    )
