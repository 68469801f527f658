"""What a computation cannot avoid: floating-point operations and bytes, and the least time they take."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.registry import Shape
from deberta_kernels.testing.geometries import settings

__all__ = ["GEOMETRY", "Geometry", "floor", "least_bytes", "needed_flops", "plain_flops"]

# Of a training step: products forward, and twice as many backward, for the inputs and for the weights.
PASSES = 3


@dataclass(frozen=True)
class Geometry:
    """Sizes of DeBERTa-v3-base, the model most people run.

    Attributes:
        heads: attention heads.
        dim: size of one head.
        position_buckets: log buckets on each side; the tables have 2 * position_buckets rows.
        max_relative_positions: distance, in tokens, at which the buckets saturate.
        layers: encoder layers.
        hidden: width of the hidden states.
        intermediate: width of the feed-forward layer.
    """

    heads: int
    dim: int
    position_buckets: int
    max_relative_positions: int
    layers: int
    hidden: int
    intermediate: int


def _geometry() -> Geometry:
    sizes = settings("v3-base")
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    return Geometry(
        heads=heads,
        dim=hidden // heads,
        position_buckets=sizes["position_buckets"],
        max_relative_positions=sizes["max_position_embeddings"],
        layers=sizes["num_hidden_layers"],
        hidden=hidden,
        intermediate=sizes["intermediate_size"],
    )


GEOMETRY = _geometry()


def needed_flops(lengths: Iterable[int], part: str = "core") -> float:
    """Count the floating-point operations that v3-base cannot avoid on real tokens; a multiply-add counts as two.

    Attention, per head: 2 * D * (Nq*Nk for q.k + Nq*Nk for p.v + the distinct (query, row) pairs that c2p reaches + the
    distinct (key, row) pairs that p2c reaches); repeated distances of one query to one row count once. Its backward
    recomputes all scores and has five products over pairs of tokens and four over pairs of token and row. In a model,
    the position tables count as cached, and all that is no product as free.

    Args:
        lengths: real tokens of each sample.
        part: "core", one layer's attention; "core backward", its forward and backward; "linear", the linear layers of
            one encoder layer; "model", a forward of all layers; "step", forward and backward of all layers.
    """
    lengths = tuple(lengths)
    if part == "linear":
        return 2.0 * (4 * GEOMETRY.hidden**2 + 2 * GEOMETRY.hidden * GEOMETRY.intermediate) * sum(lengths)
    if part in ("model", "step"):
        forward = GEOMETRY.layers * (needed_flops(lengths, "linear") + needed_flops(lengths))
        return forward * (PASSES if part == "step" else 1)
    forward = sum(lengths.count(n) * _core_flops(n) for n in set(lengths))
    if part == "core":
        return forward
    plain = sum(_plain_flops(n) for n in lengths)
    return forward + 2.5 * plain + 3 * (forward - plain)


@functools.cache
def _core_flops(length: int) -> float:
    import torch

    from deberta_kernels.position import delta
    from deberta_kernels.types import PositionSpec

    spec = PositionSpec(GEOMETRY.position_buckets, GEOMETRY.max_relative_positions)
    rows = delta(torch.arange(-(length - 1), length), spec)
    # Query i sees the window of distances [i - (n - 1), i]; key j sees [-j, n - 1 - j], the same windows.
    pairs = sum(int(rows[start : start + length].unique().numel()) for start in range(length))
    return _plain_flops(length) + 4.0 * GEOMETRY.dim * pairs * GEOMETRY.heads


def _plain_flops(length: int) -> float:
    return 4.0 * GEOMETRY.dim * length**2 * GEOMETRY.heads


def plain_flops(shape: Shape) -> float:
    """Return the operations of attention without positions: 2 products forward, 5 more backward."""
    return _plain_flops(shape.length) * shape.batch * (3.5 if shape.backward else 1)


def least_bytes(shape: Shape) -> float:
    """Return the bytes that must cross device memory: every input read once, every result written once."""
    element = 4 if shape.dtype == "float32" else 2
    tokens = shape.batch * shape.length * GEOMETRY.heads * GEOMETRY.dim * element
    tables = 2 * 2 * GEOMETRY.position_buckets * GEOMETRY.heads * GEOMETRY.dim * element
    lse = 4 * shape.batch * shape.length * GEOMETRY.heads
    forward = 4 * tokens + tables + lse
    # Backward reads q, k, v, out, dout and lse again and writes the three gradients and those of the tables.
    return forward + (8 * tokens + 2 * tables + lse if shape.backward else 0)


def floor(shape: Shape, rates: dict[str, Any]) -> dict[str, float] | None:
    """Return the shortest time in seconds by both ceilings, and the operations counted; None without rates."""
    rate = rates.get(f"{shape.dtype}_flops_per_second")
    bandwidth = rates.get("copy_bytes_per_second")
    if not rate or not bandwidth:
        return None
    flops = needed_flops([shape.length] * shape.batch, "core backward" if shape.backward else "core")
    by_matrix, by_memory = flops / rate, least_bytes(shape) / bandwidth
    return {
        "seconds": max(by_matrix, by_memory),
        "by_matrix": by_matrix,
        "by_memory": by_memory,
        "flops": flops,
        "plain_flops": plain_flops(shape),
    }
