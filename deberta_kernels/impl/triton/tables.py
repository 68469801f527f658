"""Expand the position tables by distance, and fold the gradients of the expanded tables back.

The kernels read `expanded[h, x + offset] = table[h, delta(x)]`, one row per distance, so that the linear and the
logarithmic zone look alike to them and no index is looked up inside. A margin on both sides lets them read whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from deberta_kernels.impl.triton.tuning import LARGEST_TILE
from deberta_kernels.position import attention_span, plain_tensors, position_index
from deberta_kernels.types import PositionSpec

__all__ = ["MARGIN", "DeviceTables", "Window", "device_tables", "full_window", "near_reach", "window"]

# Rows beyond the last distance in use, on each side: two of the largest tile.
MARGIN = 2 * LARGEST_TILE
# Lengths up to this share one table of delta per setting.
_LONGEST = 1 << 16
# prepare() expands a table over all its distances only when they are not many more than the table's rows.
_MAX_PREPARED = 1 << 13


@dataclass(frozen=True)
class DeviceTables:
    """Hold delta on a device, in the two orders that the table kernels read it.

    Attributes:
        delta: (high_start - low_end + 2 * MARGIN,) int32; entry i is delta(low_end - MARGIN + i).
        order: like delta; its positions sorted by their delta, ascending within one delta.
        bounds: (R + 1,) int32; order[bounds[r] : bounds[r + 1]] are the positions of row r.
        low_end: every distance <= low_end, below 0, has the same delta.
        high_start: every distance >= high_start, at least 0, has the same delta.
        low_row: that delta of the smallest distances.
        high_row: that delta of the largest distances.
    """

    delta: Tensor
    order: Tensor
    bounds: Tensor
    low_end: int
    high_start: int
    low_row: int
    high_row: int

    @property
    def first(self) -> int:
        """Distance of entry 0 of delta."""
        return self.low_end - MARGIN


@dataclass(frozen=True)
class Window:
    """Say which distances an expanded table covers: first ... first + rows - 1, margins included."""

    first: int
    rows: int

    @property
    def offset(self) -> int:
        """Row of distance 0."""
        return -self.first


def window(tables: DeviceTables, nq: int, positioned: int) -> Window:
    """Return the distances that nq queries and `positioned` keys with a position can reach, and the margins."""
    first = max(tables.low_end, min(1 - positioned, -1)) - MARGIN
    last = min(tables.high_start, max(nq - 1, 0)) + MARGIN
    return Window(first, last - first)


def near_reach(tables: DeviceTables, shift: int, tile: int) -> tuple[int, int]:
    """Return (left, right): tile I of queries is near the key tiles I - left < J < I + right, and far from all others.

    In a far tile all pairs are saturated. The kernels compute the same (`primitives.near_reach`).

    Args:
        tables: where the saturated distances start.
        shift: distance of the first pair of the tiles I = J, in tokens; less than a tile.
        tile: queries and keys per tile.
    """
    return -(-(tables.high_start + tile - 1 - shift) // tile), -(-(shift + tile - 1 - tables.low_end) // tile)


def full_window(tables: DeviceTables) -> Window | None:
    """Return every distance that is not saturated, and the margins; None when these are too many to keep around."""
    rows = tables.high_start - tables.low_end + 2 * MARGIN
    return Window(tables.low_end - MARGIN, rows) if rows <= _MAX_PREPARED else None


def device_tables(length: int, spec: PositionSpec, device: torch.device) -> DeviceTables:
    """Return the cached tables of one position setting.

    Args:
        length: more than any distance, in tokens.
        spec: only the buckets and the maximum matter.
        device: where the kernels run.
    """
    covered = max(_LONGEST, 1 << max(length - 1, 0).bit_length())
    return _cached_tables(covered, spec.position_buckets, spec.max_relative_positions, device)


@lru_cache(maxsize=64)
def _cached_tables(
    length: int, position_buckets: int, max_relative_positions: int, device: torch.device
) -> DeviceTables:
    spec = PositionSpec(position_buckets, max_relative_positions)
    index = position_index(length, spec)
    low_end, high_start = min(index.low_end, -1), max(index.high_start, 0)
    with plain_tensors():
        distances = torch.arange(low_end - MARGIN, high_start + MARGIN, device="cpu").clamp(-index.reach, index.reach)
        delta = index.delta[distances + index.reach]
        order = torch.sort(delta, stable=True).indices.to(torch.int32)
        rows = torch.arange(2 * attention_span(position_buckets, max_relative_positions) + 1, device="cpu")
        bounds = torch.searchsorted(delta.sort().values, rows.to(torch.int32)).to(torch.int32)
        # This waits for the device, once per setting: later calls may use the copy from any stream.
        low_row, high_row = int(delta[0]), int(delta[-1])
        delta, order, bounds = (x.to(device) for x in (delta, order, bounds))
    return DeviceTables(delta, order, bounds, low_end, high_start, low_row, high_row)
