"""Hugging Face's attention in plain PyTorch, with every score and probability: what no kernel computes.

The stand-alone module has no original code to fall back to, so this stands for it. Nothing here is fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.models.anatomy import AttentionModule, anatomy_of
from deberta_kernels.position import log_bucket

__all__ = ["attend_in_full"]


def attend_in_full(
    module: AttentionModule,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run one attention call of a DeBERTa-v2 module.

    Args:
        module: attention module with Hugging Face's attributes.
        hidden_states: (B, Nk, hidden size); keys and values.
        attention_mask: broadcastable to (B, H, Nq, Nk), not 0 = keep; None masks nothing.
        output_attentions: also return the probabilities.
        query_states: (B, Nq, hidden size) or None for hidden_states.
        relative_pos: (Nq, Nk), (1, Nq, Nk) or (1, 1, Nq, Nk), any integers; None for ordinary distances.
        rel_embeddings: (at least 2 * att_span, hidden size); None only without relative attention.

    Returns:
        (context, probabilities): context is (B, Nq, H * D), probabilities (B, H, Nq, Nk) or None.

    Raises:
        NotImplementedError: fewer or more queries than keys with position-to-content terms.
        ValueError: relative_pos has another shape.

    Source:
        transformers v5.23.0, models/deberta_v2/modeling_deberta_v2.py, `DisentangledSelfAttention.forward`.
    """
    queries = hidden_states if query_states is None else query_states
    anatomy = anatomy_of(module)
    q, k, v = (x.transpose(1, 2) for x in anatomy.project_heads(module, queries, hidden_states, _call))
    scale = math.sqrt(q.shape[-1] * anatomy.scale_factor(module))
    scores = q @ (k / scale).transpose(-1, -2)
    if module.relative_attention:
        scores = scores + _position_scores(module, q, k, relative_pos, rel_embeddings) / scale
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask.bool(), torch.finfo(scores.dtype).min)
    probabilities = module.dropout(torch.softmax(scores, dim=-1))
    context = (probabilities @ v).transpose(1, 2).flatten(2)
    return context, probabilities if output_attentions else None


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def _position_scores(
    module: AttentionModule, q: Tensor, k: Tensor, relative_pos: Tensor | None, rel_embeddings: Any
) -> Tensor:
    """Return the c2p and p2c scores, (B, H, Nq, Nk), before they are scaled."""
    nq, nk = q.shape[2], k.shape[2]
    rows = module.pos_dropout(rel_embeddings)
    span = module.pos_ebd_size
    if relative_pos is None:
        distances = torch.arange(nq, device=q.device)[:, None] - torch.arange(nk, device=q.device)
        relative_pos = log_bucket(distances, module.position_buckets, module.max_relative_positions)
    if relative_pos.shape[-2:] != (nq, nk) or relative_pos.numel() != nq * nk or relative_pos.dim() > 4:
        raise ValueError(
            f"relative_pos must have shape (Nq, Nk) = ({nq}, {nk}), or (1, Nq, Nk) or (1, 1, Nq, Nk), got "
            f"{tuple(relative_pos.shape)}; all samples and heads share it."
        )
    relative_pos = relative_pos.reshape(1, 1, nq, nk).to(q.device, torch.int64)
    total = q.new_zeros(())
    for table, projection in anatomy_of(module).position_projections(module).items():
        # (H, D, 2 * att_span)
        projected = projection(rows[None, : 2 * span])[0].unflatten(-1, (q.shape[1], -1)).permute(1, 2, 0)
        if table == "pos_key":
            row = torch.clamp(relative_pos + span, 0, 2 * span - 1).expand(*q.shape[:3], nk)
            total = total + torch.gather(q @ projected, -1, row)
        elif nq != nk:
            raise NotImplementedError(
                f"query_states must have as many tokens as hidden_states, {nk}, with p2c in pos_att_type, got {nq}; "
                "pass query_states of the shape of hidden_states, or none."
            )
        else:  # the row of a pair is that of key and query the other way round, negated
            row = torch.clamp(span - relative_pos, 0, 2 * span - 1).expand(*k.shape[:3], nq)
            total = total + torch.gather(k @ projected, -1, row).transpose(-1, -2)
    return total
