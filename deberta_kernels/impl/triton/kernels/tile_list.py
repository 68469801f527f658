"""The key (or query) tiles of each sample listed by what is in them, so that kernels skip the empty ones.

A list is (B, ROWS, size) int32, size one more than there are tiles. Three kinds of tiles have two rows each: for each
tile, how many tiles of the kind come before it (and at the end how many there are); then these tiles, ascending. The
kinds are ALL occupied tiles, the FULL ones among them, all of whose tokens are valid, and the PARTIAL ones. The last
row holds the number of valid tokens of each tile.
"""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import key_segments

__all__ = [
    "ALL",
    "FULL",
    "PARTIAL",
    "ROWS",
    "_disentangled_tile_list_kernel",
    "is_partial",
    "kind_range",
    "listed",
    "occupied",
]

ALL = tl.constexpr(0)
FULL = tl.constexpr(2)
PARTIAL = tl.constexpr(4)
ROWS = tl.constexpr(7)
# Tiles counted at once.
BATCH_OF_TILES = tl.constexpr(32)


@triton.jit
def kind_range(tile_list, size, first, last, KIND: tl.constexpr):
    """Return [start, stop): which entries of a kind lie in the range of tiles [first, last)."""
    row = tile_list + KIND * size
    return tl.load(row + first), tl.load(row + last)


@triton.jit
def listed(tile_list, size, n, KIND: tl.constexpr):
    """Return the tile of entry n of a kind."""
    return tl.load(tile_list + (KIND + 1) * size + n)


@triton.jit
def is_partial(tile_list, size, tile, TILE: tl.constexpr):
    """Tell whether some token of a tile is not valid."""
    return tl.load(tile_list + 6 * size + tile) < TILE


@triton.jit
def occupied(tile_list, size, first, last):
    """Cut the range of tiles [first, last) to the first and last occupied one; empty when none is."""
    n0, n1 = kind_range(tile_list, size, first, last, ALL)
    row = tile_list + size
    start = tl.load(row + n0, mask=n0 < n1, other=0)
    stop = tl.load(row + n1 - 1, mask=n0 < n1, other=-1) + 1
    return start, stop


@triton.jit
def _append(base, size, tile, belongs, exists, found, KIND: tl.constexpr):
    """Write the entries of one kind among a batch of tiles; return how many there are so far."""
    flag = belongs.to(tl.int32)
    rank = found + tl.cumsum(flag, 0) - flag
    tl.store(base + KIND * size + tile, rank, mask=exists)
    tl.store(base + (KIND + 1) * size + rank, tile, mask=exists & belongs)
    return found + tl.sum(flag, 0)


@triton.jit(
    do_not_specialize=("stride_mb", "length", "prefix", "size", "all_partial"),
    do_not_specialize_on_alignment=("mask_ptr",),
)
def _disentangled_tile_list_kernel(
    mask_ptr, tile_list_ptr, stride_mb: tl.int64, length, prefix, size, all_partial, TILE: tl.constexpr
):  # fmt: skip
    """Write the list of each sample; the grid is (B,). With all_partial no tile counts as full."""
    b = tl.program_id(0)
    prefix_tiles, tiles, start = key_segments(length, prefix, TILE)
    base = tile_list_ptr + b.to(tl.int64) * size * ROWS
    mask_base = mask_ptr + b * stride_mb
    offs_t = tl.arange(0, TILE)
    found = 0
    found_full = 0
    found_partial = 0
    for first in range(0, tiles, BATCH_OF_TILES):
        tile = first + tl.arange(0, BATCH_OF_TILES)
        exists = tile < tiles
        is_prefix = tile < prefix_tiles
        j0 = tl.where(is_prefix, tile * TILE, start + (tile - prefix_tiles) * TILE)
        offs_j = j0[:, None] + offs_t[None, :]
        low = tl.where(is_prefix, 0, prefix)[:, None]
        high = tl.where(is_prefix, prefix, length)[:, None]
        inside = (offs_j >= low) & (offs_j < high) & exists[:, None]
        valid = tl.load(mask_base + offs_j, mask=inside, other=0) != 0
        count = tl.sum(valid.to(tl.int32), 1)
        full = (count - all_partial) == TILE
        found = _append(base, size, tile, count > 0, exists, found, ALL)
        found_full = _append(base, size, tile, full, exists, found_full, FULL)
        found_partial = _append(base, size, tile, (count > 0) & (full == 0), exists, found_partial, PARTIAL)
        tl.store(base + 6 * size + tile, count, mask=exists)
    tl.store(base + tiles, found)
    tl.store(base + FULL * size + tiles, found_full)
    tl.store(base + PARTIAL * size + tiles, found_partial)
