"""Position tables expanded by distance, as both kinds of GPU kernels read them: which distances, and what is kept.

The kernels read `expanded[h, x + offset] = table[h, delta(x)]`, one row per distance, so that the linear and the
logarithmic zone look alike to them and no index is looked up inside. A margin on both sides lets them read whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.position import PositionIndex, position_index
from deberta_kernels.types import PositionSpec

__all__ = ["PREFIX_STEP", "Ends", "Window", "check_prepared", "ends_of", "shared_index", "shared_length"]

# Tiles of keys with a position start at a multiple of this, so that the eight keys of one dropout counter never lie in
# two tiles.
PREFIX_STEP = 16
# Lengths up to this share one index per setting: the distances of most are saturated long before, and a table on the
# device for every length would have no end.
_LONGEST_SHARED = 1 << 16
# A table is expanded over all its distances, for calls of any length, only when they are not many more than its rows:
# 8,192 rows of 64 numbers in 16 bits are 1 MiB per head and table.
_MOST_PREPARED = 1 << 13


@dataclass(frozen=True)
class Window:
    """The distances that an expanded table covers: first ... first + rows - 1, margins included."""

    first: int
    rows: int

    @property
    def offset(self) -> int:
        """Row of distance 0."""
        return -self.first

    @property
    def stop(self) -> int:
        """First distance beyond it."""
        return self.first + self.rows


class Ends(NamedTuple):
    """Where distances saturate, which is what makes a tile near or far.

    Attributes:
        low_end: every distance <= low_end, below 0, has the same delta.
        high_start: every distance >= high_start, at least 0, has the same delta.
    """

    low_end: int
    high_start: int

    def window(self, nq: int, positioned: int, margin: int) -> Window:
        """Return the distances that nq queries and `positioned` keys with a position can reach, and the margins."""
        first = max(self.low_end, min(1 - positioned, -1)) - margin
        return Window(first, min(self.high_start, max(nq - 1, 0)) + margin - first)

    def full_window(self, margin: int) -> Window | None:
        """Return every distance that is not saturated, and the margins; None when these are too many to keep around."""
        rows = self.high_start - self.low_end + 2 * margin
        return Window(self.low_end - margin, rows) if rows <= _MOST_PREPARED else None


def ends_of(index: PositionIndex) -> Ends:
    """Return where the distances of an index saturate, as the kernels expect it: on either side of 0."""
    return Ends(min(index.low_end, -1), max(index.high_start, 0))


def shared_length(length: int) -> int:
    """Return the length, in tokens, whose index serves a call of this length: one for all usual calls."""
    return max(_LONGEST_SHARED, 1 << max(length - 1, 0).bit_length())


def shared_index(length: int, position: PositionSpec) -> PositionIndex:
    """Return the index of distances that calls of this length, in tokens, share."""
    return position_index(shared_length(length), position)


def check_prepared(prepared: Tensor, q: Tensor, covered: Window | None, columns: int) -> Window:
    """Check that prepared tables are as large as the kernels will read; return the distances they cover.

    Args:
        prepared: the tables.
        q: (B, H, Nq, D), whose dtype and device they have.
        covered: what `Ends.full_window` returned.
        columns: numbers in a row of an expanded table.

    Raises:
        ValueError: they are not what `prepare` returned for these tables.
    """
    shape = None if covered is None else (2, q.shape[1], covered.rows, columns)
    same = prepared.dtype == q.dtype and prepared.device == q.device and prepared.is_contiguous()
    if covered is None or prepared.shape != shape or not same:
        raise ValueError(
            f"prepared must be what prepare returned for these tables, got shape {tuple(prepared.shape)} in "
            f"{dtypes.name(prepared.dtype)} on {prepared.device} where the kernels read {shape} in "
            f"{dtypes.name(q.dtype)} on {q.device}, contiguous; prepare the tables again."
        )
    return covered
