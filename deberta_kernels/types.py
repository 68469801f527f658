"""The values that travel through the package: masks, position settings, one attention problem. Nobody changes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["ARGUMENTS", "AttentionProblem", "Gradients", "Masks", "PositionSpec"]


@dataclass(frozen=True)
class PositionSpec:
    """How a distance becomes a row of the position tables.

    Attributes:
        position_buckets: > 0: log buckets, att_span = position_buckets; <= 0: linear, att_span =
            max_relative_positions.
        max_relative_positions: distance, in tokens, at which the log buckets (or the linear index) saturate.
        first_row: row of the full table that row 0 of the tables given holds; 0 for full tables.
        prefix_length: number of leading keys without a position; key j has position j - prefix_length.
    """

    position_buckets: int = 256
    max_relative_positions: int = 512
    first_row: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Masks:
    """Every mask of one call; any part may be None, which masks nothing.

    Attributes:
        key: (B, Nk) bool; False = nobody may attend to this key.
        query: (B, Nq) bool; False = this query row is padding and follows the padded-row rule of `masks`.
        pair: (B, 1 or H, Nq, Nk) bool; False = this query may not attend to this key.
    """

    key: torch.Tensor | None = None
    query: torch.Tensor | None = None
    pair: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Masks:
        """Return the masks that `function` makes of these; one tensor in two parts stays one."""
        key = None if self.key is None else function(self.key)
        query = key if self.query is self.key else None if self.query is None else function(self.query)
        return Masks(key, query, None if self.pair is None else function(self.pair))


@dataclass(eq=False, slots=True)
class AttentionProblem:
    """One validated attention call, as every backend receives it.

    It is not frozen because one is made at every call, and a frozen one takes ten times as long to make.

    Attributes:
        q: (B, H, Nq, D), any strides; float32, float16, bfloat16 or float64.
        k: (B, H, Nk, D), dtype and device of q.
        v: (B, H, Nk, D), dtype and device of q.
        pos_key: (H, rows, D) or None: K_r of the paper, rows `first_row ...` of the full table.
        pos_query: (H, rows, D) or None: Q_r of the paper.
        masks: see `Masks`; all None when cu_seqlens is given.
        position: see `PositionSpec`.
        scale: multiplies raw scores.
        dropout_p: probability in [0, 1) that one attention probability is dropped.
        seed: (1,) int64 on the device of q, key of the dropout counter; None when dropout_p is 0.
        cu_seqlens: (S + 1,) int32 on the device of q, or None. When given, B = 1 and Nq = Nk = T tokens of S
            sequences packed one after the other; positions count inside each sequence.
        max_seqlen: upper bound of the sequence lengths, in tokens; max(Nq, Nk) without cu_seqlens.
        prepared: what the backend's own `prepare` returned for exactly these tables, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pos_key: torch.Tensor | None
    pos_query: torch.Tensor | None
    masks: Masks
    position: PositionSpec
    scale: float
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    prepared: torch.Tensor | None = None

    def changed(self, **fields: Any) -> AttentionProblem:
        """Return a copy with other values in some fields; `dataclasses.replace` takes several microseconds more."""
        copy = AttentionProblem(
            self.q, self.k, self.v, self.pos_key, self.pos_query, self.masks, self.position, self.scale, self.dropout_p,
            self.seed, self.cu_seqlens, self.max_seqlen, self.prepared,
        )  # fmt: skip
        for name, value in fields.items():
            setattr(copy, name, value)
        return copy

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return the first values of `ARGUMENTS`, those that are tensors or None."""
        masks = self.masks
        return (
            self.q, self.k, self.v, self.pos_key, self.pos_query, masks.key, masks.query, masks.pair, self.cu_seqlens,
            self.seed, self.prepared,
        )  # fmt: skip

    def with_tensors(self, tensors: Sequence[Any]) -> AttentionProblem:
        """Return a copy with other tensors, in the order of `tensors`; more may follow them."""
        q, k, v, pos_key, pos_query, key, query, pair, cu_seqlens, seed, prepared = tensors[:11]
        return self.changed(
            q=q, k=k, v=v, pos_key=pos_key, pos_query=pos_query, masks=Masks(key, query, pair), cu_seqlens=cu_seqlens,
            seed=seed, prepared=prepared,
        )  # fmt: skip

    def arguments(self) -> tuple[Any, ...]:
        """Return the values of `ARGUMENTS`."""
        position = self.position
        return (
            *self.tensors(), self.max_seqlen, position.position_buckets, position.max_relative_positions,
            position.first_row, position.prefix_length, self.scale, self.dropout_p,
        )  # fmt: skip

    @staticmethod
    def of_arguments(arguments: Sequence[Any]) -> AttentionProblem:
        """Return the problem whose `arguments` these are; more may follow them."""
        (
            q, k, v, pos_key, pos_query, key, query, pair, cu_seqlens, seed, prepared, max_seqlen, buckets, most,
            first_row, prefix, scale, dropout_p,
        ) = arguments[: len(ARGUMENTS)]  # fmt: skip
        masks, position = Masks(key, query, pair), PositionSpec(buckets, most, first_row, prefix)
        return AttentionProblem(
            q, k, v, pos_key, pos_query, masks, position, scale, dropout_p, seed, cu_seqlens, max_seqlen, prepared
        )


# The arguments of the operators in the order of their schema: name and type.
ARGUMENTS = (
    ("q", "Tensor"),
    ("k", "Tensor"),
    ("v", "Tensor"),
    ("pos_key", "Tensor?"),
    ("pos_query", "Tensor?"),
    ("key_mask", "Tensor?"),
    ("query_mask", "Tensor?"),
    ("pair_mask", "Tensor?"),
    ("cu_seqlens", "Tensor?"),
    ("seed", "Tensor?"),
    ("prepared", "Tensor?"),
    ("max_seqlen", "SymInt"),
    ("position_buckets", "int"),
    ("max_relative_positions", "int"),
    ("first_row", "SymInt"),
    ("prefix_length", "SymInt"),
    ("scale", "float"),
    ("dropout_p", "float"),
)


class Gradients(NamedTuple):
    """The gradients of one backward call; None where none was asked for.

    Attributes:
        dq: shape and dtype of q.
        dk: shape and dtype of k.
        dv: shape and dtype of v.
        dpos_key: shape and dtype of pos_key.
        dpos_query: shape and dtype of pos_query.
    """

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    dpos_key: torch.Tensor | None
    dpos_query: torch.Tensor | None
