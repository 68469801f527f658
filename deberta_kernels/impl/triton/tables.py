"""`delta` on a device, for the kernels that expand the position tables and fold the gradients back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deberta_kernels.impl.gpu_tables import Ends, Window, ends_of, shared_length
from deberta_kernels.impl.triton.tuning import LARGEST_TILE, MOST_GROUPS
from deberta_kernels.position import attention_span, plain_tensors, position_index
from deberta_kernels.torch_state.captures import kept_on_device
from deberta_kernels.types import PositionSpec

__all__ = ["MARGIN", "DeviceTables", "device_tables", "near_reach"]

# Rows beyond the last distance in use, on each side: a program's queries, and a tile of keys.
MARGIN = (MOST_GROUPS + 1) * LARGEST_TILE


@dataclass(frozen=True)
class DeviceTables:
    """The values of delta on a device, in the two orders that the table kernels read them.

    Attributes:
        delta: (high_start - low_end + 2 * MARGIN,) int32; entry i is delta(low_end - MARGIN + i).
        order: like delta; its positions sorted by their delta, ascending within one delta.
        bounds: (R + 1,) int32; order[bounds[r] : bounds[r + 1]] are the positions of row r.
        ends: where distances saturate.
        low_row: that delta of the smallest distances.
        high_row: that delta of the largest distances.
    """

    delta: Tensor
    order: Tensor
    bounds: Tensor
    ends: Ends
    low_row: int
    high_row: int

    @property
    def first(self) -> int:
        """Distance of entry 0 of delta."""
        return self.ends.low_end - MARGIN

    def window(self, nq: int, positioned: int) -> Window:
        """Return the distances that nq queries and `positioned` keys with a position can reach; see `Ends.window`."""
        return self.ends.window(nq, positioned, MARGIN)

    def full_window(self) -> Window | None:
        """Return the distances that prepared tables cover, or None where none are kept; see `Ends.full_window`."""
        return self.ends.full_window(MARGIN)


def near_reach(ends: Ends, shift: int, tile: int) -> tuple[int, int]:
    """Return (left, right): tile I of queries is near the key tiles I - left < J < I + right, and far from all others.

    In a far tile all pairs are saturated. The kernels compute the same (`primitives.near_reach`).

    Args:
        ends: where distances saturate.
        shift: distance of the first pair of the tiles I = J, in tokens; less than a tile.
        tile: queries and keys per tile.
    """
    return -(-(ends.high_start + tile - 1 - shift) // tile), -(-(shift + tile - 1 - ends.low_end) // tile)


def device_tables(length: int, spec: PositionSpec, device: torch.device) -> DeviceTables:
    """Return the cached tables of one position setting.

    Args:
        length: more than any distance, in tokens.
        spec: only the buckets and the maximum matter.
        device: where the kernels run.
    """
    return _position_tables(device, shared_length(length), spec.position_buckets, spec.max_relative_positions)


@kept_on_device(64)
def _position_tables(
    device: torch.device, length: int, position_buckets: int, max_relative_positions: int
) -> DeviceTables:
    spec = PositionSpec(position_buckets, max_relative_positions)
    index = position_index(length, spec)
    ends = ends_of(index)
    with plain_tensors():
        delta = index.rows(torch.arange(ends.low_end - MARGIN, ends.high_start + MARGIN, device="cpu"))
        order = torch.sort(delta, stable=True).indices.to(torch.int32)
        rows = torch.arange(2 * attention_span(position_buckets, max_relative_positions) + 1, device="cpu")
        bounds = torch.searchsorted(delta.sort().values, rows.to(torch.int32)).to(torch.int32)
        # This waits for the device, once per setting: later calls may use the copy from any stream.
        low_row, high_row = int(delta[0]), int(delta[-1])
        delta, order, bounds = (x.to(device) for x in (delta, order, bounds))
    return DeviceTables(delta, order, bounds, ends, low_row, high_row)
