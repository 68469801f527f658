"""Frozen values that travel between the rooms of the package: masks, position settings, one attention problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["AttentionProblem", "Gradients", "Masks", "PositionSpec"]


@dataclass(frozen=True)
class PositionSpec:
    """Say how a distance becomes a row of the position tables.

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
    """Hold every mask of one call; any part may be None, which masks nothing.

    Attributes:
        key: (B, Nk) bool; False = nobody may attend to this key.
        query: (B, Nq) bool; False = this query row is padding and follows the padded-row rule of `masks`.
        pair: (B, 1 or H, Nq, Nk) bool; False = this query may not attend to this key.
    """

    key: torch.Tensor | None = None
    query: torch.Tensor | None = None
    pair: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionProblem:
    """Hold one validated attention call, as every backend receives it.

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
        copy = object.__new__(AttentionProblem)
        copy.__dict__.update(self.__dict__, **fields)
        return copy


class Gradients(NamedTuple):
    """Hold the gradients of one backward call; None where none was asked for.

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
