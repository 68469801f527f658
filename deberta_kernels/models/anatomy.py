"""Read what an attention module of Hugging Face is made of: DeBERTa v1 and v2 name, pack and count things differently.

    what                    v1                                    v2 and v3
    queries, keys, values   in_proj, interleaved by head; q_bias, v_bias   query_proj, key_proj, value_proj
    position tables         pos_proj, pos_q_proj                  pos_key_proj, pos_query_proj, or those of q and k
    distance -> row         linear                                log buckets, or linear
    terms in the scale      every one that is named               c2p and p2c
    no relative_pos         no position terms                     ordinary distances

The rest of the package asks `is_version_one` where the two differ.

Source: transformers v5.23.0, models/deberta/modeling_deberta.py and models/deberta_v2/modeling_deberta_v2.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from deberta_kernels.types import PositionSpec

__all__ = [
    "TALKING_HEADS",
    "Apply",
    "AttentionModule",
    "is_version_one",
    "mixes_heads",
    "position_projections",
    "position_spec",
    "project_heads",
    "scale_factor",
]

# An nn.Module with the attributes of Hugging Face's DisentangledSelfAttention, of either version.
AttentionModule: TypeAlias = Any
# Calls a linear layer.
Apply: TypeAlias = Callable[[nn.Module, Tensor], Tensor]

# Why a module that mixes heads is not fused, and what the user can change.
TALKING_HEADS = ("talking_head mixes the scores of different heads", "models of this kind are not fused")


def is_version_one(module: AttentionModule) -> bool:
    """Tell whether an attention module is DeBERTa v1's: one projection for queries, keys and values."""
    return "in_proj" in module._modules


def mixes_heads(module: AttentionModule) -> bool:
    """Tell whether the scores or probabilities of one head enter those of another, as `talking_head` makes them."""
    own, parts = module.__dict__, module._modules
    mixers = ("head_logits_proj", "head_weights_proj")
    return any(parts.get(name) is not None or own.get(name) is not None for name in mixers)


def scale_factor(module: AttentionModule) -> int:
    """Return 1 + the number of position terms that Hugging Face counts, even where relative attention is off.

    In a list, v2 counts neither unknown terms nor "c2p|p2c"; v1 counts whatever stands there.
    """
    if is_version_one(module):
        return 1 + len(module.pos_att_type)
    return 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)


def position_spec(module: AttentionModule) -> PositionSpec:
    """Return how `module` turns distances into rows; the default where relative attention is off.

    v1 takes the middle rows of the table for a text shorter than its half; those are the rows of the linear index.
    """
    if not module.relative_attention:
        return PositionSpec()
    buckets = -1 if is_version_one(module) else module.position_buckets
    return PositionSpec(buckets, module.max_relative_positions)


def position_projections(module: AttentionModule) -> dict[str, nn.Module]:
    """Return the projection module of each position term that is on, by the table it makes."""
    if not module.relative_attention:
        return {}
    if is_version_one(module):
        names = ("pos_proj", "pos_q_proj")
    else:
        names = ("key_proj", "query_proj") if module.share_att_key else ("pos_key_proj", "pos_query_proj")
    terms = (("c2p", "pos_key", names[0]), ("p2c", "pos_query", names[1]))
    if not is_version_one(module) and module.share_att_key:
        terms = terms[::-1]  # in Hugging Face's order
    return {table: getattr(module, name) for term, table, name in terms if term in module.pos_att_type}


def project_heads(
    module: AttentionModule, queries: Tensor, hidden_states: Tensor, apply: Apply
) -> tuple[Tensor, Tensor, Tensor]:
    """Project the states into the queries, keys and values of every head.

    Args:
        module: attention module.
        queries: (B, N, hidden size); hidden_states itself in v1.
        hidden_states: (B, N, hidden size); keys and values.
        apply: calls a projection.

    Returns:
        three of (B, N, H, D).
    """
    if is_version_one(module):
        packed = _split(module, apply(module.in_proj, hidden_states))
        q, k, v = packed.chunk(3, dim=-1)
        return q + _split(module, module.q_bias), k, v + _split(module, module.v_bias)
    q = _split(module, apply(module.query_proj, queries))
    k = _split(module, apply(module.key_proj, hidden_states))
    v = _split(module, apply(module.value_proj, hidden_states))
    return q, k, v


def _split(module: AttentionModule, projected: Tensor) -> Tensor:
    """View (..., H * D) as (..., H, D)."""
    heads: Tensor = projected.unflatten(-1, (module.num_attention_heads, -1))
    return heads
