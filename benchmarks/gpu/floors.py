"""Say how fast a device could be at best: fewest operations over its matrix rate, fewest bytes over its bandwidth."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.registry import GEOMETRY, Shape, needed_flops

__all__ = ["floor", "plain_flops"]


def plain_flops(shape: Shape) -> float:
    """Return the operations of attention without positions: 2 products forward, 5 more backward."""
    products = 7 if shape.backward else 2
    return 2.0 * GEOMETRY.dim * products * shape.length**2 * GEOMETRY.heads * shape.batch


@functools.cache
def _forward_flops(shape: Shape) -> float:
    return needed_flops(shape)


def needed(shape: Shape) -> float:
    """Return the operations no kernel can avoid; those of positions are counted per distinct pair of token and row.

    Backward recomputes both position scores and has four more products over the same pairs, to dq, dk and both tables.
    """
    forward = _forward_flops(Shape(shape.batch, shape.length, shape.dtype))
    if not shape.backward:
        return forward
    plain = plain_flops(Shape(shape.batch, shape.length, shape.dtype))
    return forward + (plain_flops(shape) - plain) + 3 * (forward - plain)


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
    by_matrix, by_memory = needed(shape) / rate, least_bytes(shape) / bandwidth
    return {
        "seconds": max(by_matrix, by_memory),
        "by_matrix": by_matrix,
        "by_memory": by_memory,
        "flops": needed(shape),
        "plain_flops": plain_flops(shape),
    }
