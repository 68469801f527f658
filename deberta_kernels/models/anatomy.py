"""What an attention module of Hugging Face is made of: DeBERTa v1 and v2 name, pack and count things differently.

    what                    v1                                    v2 and v3
    queries, keys, values   in_proj, interleaved by head; q_bias, v_bias   query_proj, key_proj, value_proj
    position tables         pos_proj, pos_q_proj                  pos_key_proj, pos_query_proj, or those of q and k
    distance -> row         linear                                log buckets, or linear
    terms in the scale      every one that is named               c2p and p2c
    no relative_pos         no position terms                     ordinary distances
    query_states            none                                  as many as keys

`anatomy_of` returns the object that answers for a module; nothing else asks which version it is.

Source: transformers v5.23.0, models/deberta/modeling_deberta.py and models/deberta_v2/modeling_deberta_v2.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from deberta_kernels.types import PositionSpec

__all__ = [
    "TALKING_HEADS",
    "VERSION_ONE",
    "VERSION_TWO",
    "Anatomy",
    "Apply",
    "AttentionModule",
    "anatomy_of",
    "mixes_heads",
]

# An nn.Module with the attributes of Hugging Face's DisentangledSelfAttention, of either version.
AttentionModule: TypeAlias = Any
# Calls a linear layer.
Apply: TypeAlias = Callable[[nn.Module, Tensor], Tensor]

# Why a module that mixes heads is not fused, and what the user can change.
TALKING_HEADS = ("talking_head mixes the scores of different heads", "models of this kind are not fused")


def mixes_heads(module: AttentionModule) -> bool:
    """Tell whether the scores or probabilities of one head enter those of another, as `talking_head` makes them."""
    own, parts = module.__dict__, module._modules
    for name in ("head_logits_proj", "head_weights_proj"):
        if parts.get(name) is not None or own.get(name) is not None:
            return True
    return False


class Anatomy(ABC):
    """One version of DeBERTa's attention: what its modules are made of, and what their arguments mean.

    Attributes:
        home: module of transformers that defines its classes.
        takes_queries: query_states other than hidden_states may be given.
        counts_distances: no relative_pos means ordinary distances; else it means no position terms.
    """

    home: ClassVar[str]
    takes_queries: ClassVar[bool]
    counts_distances: ClassVar[bool]

    @abstractmethod
    def project_heads(
        self, module: AttentionModule, queries: Tensor, hidden_states: Tensor, apply: Apply
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project the states into the queries, keys and values of every head.

        Args:
            module: attention module.
            queries: (B, N, hidden size); hidden_states itself unless `takes_queries`.
            hidden_states: (B, N, hidden size); keys and values.
            apply: calls a projection.

        Returns:
            three of (B, N, H, D).
        """

    @abstractmethod
    def position_projections(self, module: AttentionModule) -> dict[str, nn.Module]:
        """Return the projection module of each position term that is on, by the table it makes."""

    @abstractmethod
    def position_calls(self, module: AttentionModule) -> list[nn.Module]:
        """Return the projections that Hugging Face calls for the position tables, in its order."""

    @abstractmethod
    def position_reach(self, length: int, span: int) -> int:
        """Return how many rows on each side of the middle Hugging Face projects for a text of `length` tokens."""

    @abstractmethod
    def position_numbers(self, module: AttentionModule) -> tuple[int, int]:
        """Return position_buckets and max_relative_positions of a module with relative attention."""

    def position_spec(self, module: AttentionModule) -> PositionSpec:
        """Return how a module turns distances into rows; the default where relative attention is off."""
        return PositionSpec(*self.position_numbers(module)) if module.relative_attention else PositionSpec()

    @abstractmethod
    def scale_factor(self, module: AttentionModule) -> int:
        """Return 1 + the number of position terms that Hugging Face counts, even where relative attention is off."""

    @abstractmethod
    def agrees(self, encoder: Any, module: AttentionModule) -> bool:
        """Tell whether the distances that an encoder hands over are those that a module counts by itself."""


class _VersionOne(Anatomy):
    """DeBERTa v1."""

    home = "transformers.models.deberta.modeling_deberta"
    takes_queries = False
    counts_distances = False

    def project_heads(
        self, module: AttentionModule, queries: Tensor, hidden_states: Tensor, apply: Apply
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed, q_bias, v_bias = _split(module, apply(module.in_proj, hidden_states), module.q_bias, module.v_bias)
        q, k, v = packed.chunk(3, dim=-1)
        return q + q_bias, k, v + v_bias

    def position_projections(self, module: AttentionModule) -> dict[str, nn.Module]:
        return _named(module, ("c2p", "pos_key", "pos_proj"), ("p2c", "pos_query", "pos_q_proj"))

    def position_calls(self, module: AttentionModule) -> list[nn.Module]:
        return list(self.position_projections(module).values())

    def position_reach(self, length: int, span: int) -> int:
        return min(length, span)

    def position_numbers(self, module: AttentionModule) -> tuple[int, int]:
        # The middle rows that a text shorter than half the table takes are those of the linear index.
        return -1, module.max_relative_positions

    def scale_factor(self, module: AttentionModule) -> int:
        return 1 + len(module.pos_att_type)  # whatever stands there

    def agrees(self, encoder: Any, module: AttentionModule) -> bool:
        return bool(encoder.relative_attention == module.relative_attention)


class _VersionTwo(Anatomy):
    """DeBERTa v2 and v3."""

    home = "transformers.models.deberta_v2.modeling_deberta_v2"
    takes_queries = True
    counts_distances = True

    def project_heads(
        self, module: AttentionModule, queries: Tensor, hidden_states: Tensor, apply: Apply
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = apply(module.query_proj, queries), apply(module.key_proj, hidden_states)
        q, k, v = _split(module, q, k, apply(module.value_proj, hidden_states))
        return q, k, v

    def position_projections(self, module: AttentionModule) -> dict[str, nn.Module]:
        if not module.relative_attention or not module.share_att_key:
            return _named(module, ("c2p", "pos_key", "pos_key_proj"), ("p2c", "pos_query", "pos_query_proj"))
        return _named(module, ("p2c", "pos_query", "query_proj"), ("c2p", "pos_key", "key_proj"))

    def position_calls(self, module: AttentionModule) -> list[nn.Module]:
        if module.share_att_key:
            return [module.query_proj, module.key_proj]  # both, whichever terms are on
        return list(self.position_projections(module).values())

    def position_reach(self, length: int, span: int) -> int:
        return span

    def position_numbers(self, module: AttentionModule) -> tuple[int, int]:
        return module.position_buckets, module.max_relative_positions

    def scale_factor(self, module: AttentionModule) -> int:
        # In a list, neither unknown terms nor "c2p|p2c" are counted.
        return 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)

    def agrees(self, encoder: Any, module: AttentionModule) -> bool:
        if encoder.relative_attention != module.relative_attention:
            return False
        if not encoder.relative_attention:
            return True
        if encoder.position_buckets > 0 and torch.get_default_dtype() != torch.float32:
            return False  # Hugging Face counts log buckets in the default dtype
        return bool(
            encoder.position_buckets == module.position_buckets
            and encoder.max_relative_positions == module.max_relative_positions
        )


VERSION_ONE, VERSION_TWO = _VersionOne(), _VersionTwo()


def anatomy_of(module: AttentionModule) -> Anatomy:
    """Return the version that an attention module is of: v1 has one projection for queries, keys and values."""
    return VERSION_ONE if "in_proj" in module._modules else VERSION_TWO


def _named(module: AttentionModule, *terms: tuple[str, str, str]) -> dict[str, nn.Module]:
    """Return the projections of (term, table, name) that are on, by their tables."""
    found: dict[str, nn.Module] = {}
    if module.relative_attention:
        for term, table, name in terms:
            if term in module.pos_att_type:
                found[table] = getattr(module, name)
    return found


def _split(module: AttentionModule, *projected: Tensor) -> list[Tensor]:
    """View each (..., H * D) as (..., H, D)."""
    heads = module.num_attention_heads, -1
    return [torch.unflatten(x, -1, heads) for x in projected]
