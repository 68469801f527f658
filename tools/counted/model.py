"""A time model: cycles of the units of a multiprocessor, from figures that were counted.

For 64 x 64 pairs, or for what a program takes beside its tiles, each unit of a multiprocessor has its own number of
cycles: issue slots, matrix units, exponentials, shared memory, and bytes from L2. Units overlap, but not fully: the
estimate is the longest, half the second and a quarter of the third. Expect it to be off by 30 %. It says nothing about
launches, about waves that do not fill the device, or about latency; short shapes are slower than it says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deberta_kernels.impl.gpu_tables import ends_of
from deberta_kernels.position import position_index
from deberta_kernels.types import PositionSpec

__all__ = ["DEVICE", "Device", "Work", "cycles", "milliseconds", "tiles", "units"]


@dataclass(frozen=True)
class Device:
    """What the time model knows of an H200, or an H100: the same processor.

    Attributes:
        multiprocessors: of the device.
        clock: cycles per second, chosen so that `products` of bfloat16 a cycle give its data sheet's rate.
        products: multiplications and additions of dense bfloat16 products, per cycle and multiprocessor.
        special: exponentials and the like, per cycle and multiprocessor.
        l2_bytes: from L2, per cycle and multiprocessor, sustained.
    """

    multiprocessors: int = 132
    clock: float = 1.755e9
    products: int = 2048
    special: int = 16
    l2_bytes: float = 24.0


DEVICE = Device()
_WARPS, _LANES = 4, 32  # of a tile
_WAVEFRONT, _SECTOR = 128, 32  # bytes


@dataclass(frozen=True)
class Work:
    """The estimated cycles of one kernel's parts.

    Attributes:
        near, far: of 64 x 64 pairs.
        program: of a thread block, beside its tiles.
        rows: queries, or keys, of a thread block.
    """

    near: float
    far: float
    program: float
    rows: int


def units(figures: dict[str, float], compiled: int | None = None, local: int = 0) -> dict[str, float]:
    """Return the cycles of each unit.

    Args:
        figures: as `counted.figures.Figures.values`.
        compiled: machine instructions per warp of one pass, in the place of those of the PTX.
        local: accesses to local memory per warp, where registers spill to: of shared memory each, when they hit L1.
    """
    return {
        "issue": figures["instructions"] if compiled is None else compiled,
        "matrix": figures["matrix"] * 64 * 64 * 16 / DEVICE.products,
        "exponentials": figures["special"] * _WARPS * _LANES / DEVICE.special,
        "shared": figures["wavefronts"] + figures["operands"] + figures["engine"] / _WAVEFRONT + _WARPS * local,
        "l2": figures["sectors"] * _SECTOR / DEVICE.l2_bytes,
    }


def cycles(by_unit: dict[str, float]) -> float:
    """Return the estimated cycles from those of each unit, by the rule above."""
    longest = sorted(by_unit.values(), reverse=True)
    return longest[0] + 0.5 * longest[1] + 0.25 * longest[2]


def tiles(length: int, rows: int, spec: PositionSpec) -> tuple[int, int]:
    """Return how many 64 x 64 pairs of one head are in near tiles, and how many in far ones.

    Args:
        length: queries and keys, in tokens.
        rows: of a tile; it has 64 columns.
        spec: where distances saturate. Only the buckets and the maximum matter.
    """
    ends = ends_of(position_index(1 << 14, spec))
    first = torch.arange(0, length, rows)[:, None] - torch.arange(0, length, 64)
    near = (first - 63 < ends.high_start) & (first + rows - 1 > ends.low_end)
    return int(near.sum()) * rows // 64, int((~near).sum()) * rows // 64


def milliseconds(work: Work, length: int, *, heads: int, tokens: int, spec: PositionSpec) -> float:
    """Return the estimated time of one kernel over a batch of `tokens` tokens, of sequences of a length."""
    near, far = tiles(length, work.rows, spec)
    programs = -(-length // work.rows)
    each = near * work.near + far * work.far + programs * work.program
    return 1e3 * heads * (tokens // length) * each / (DEVICE.multiprocessors * DEVICE.clock)
