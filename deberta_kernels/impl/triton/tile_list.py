"""List the key (or query) tiles of each sample that hold a valid token, so that kernels can skip the others."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.primitives import key_segments

__all__ = ["occupied", "tile_list_kernel"]

# Tiles counted at once.
BATCH_OF_TILES = tl.constexpr(32)


@triton.jit
def occupied(tile_list, list_size, first, last):
    """Cut the range of tiles [first, last) to the first and last that are on the list; empty when none is."""
    n0 = tl.load(tile_list + first)
    n1 = tl.load(tile_list + last)
    start = tl.load(tile_list + list_size + n0, mask=n0 < n1, other=0)
    stop = tl.load(tile_list + list_size + n1 - 1, mask=n0 < n1, other=-1) + 1
    return start, stop


@triton.jit(
    do_not_specialize=("stride_mb", "stride_mn", "length", "prefix", "list_size"),
    do_not_specialize_on_alignment=("mask_ptr",),
)
def tile_list_kernel(
    mask_ptr, tile_list_ptr, stride_mb: tl.int64, stride_mn: tl.int64, length, prefix, list_size, TILE: tl.constexpr
):  # fmt: skip
    """Write, for each sample, three rows of list_size int32; the grid is (B,).

    Row 0: for each tile, how many tiles before it are occupied; one entry more than there are tiles. Row 1: the
    occupied tiles, ascending. Row 2: for each tile, its number of valid tokens.
    """
    b = tl.program_id(0)
    prefix_tiles, tiles, start = key_segments(length, prefix, TILE)
    base = tile_list_ptr + b * list_size * 3
    mask_base = mask_ptr + b * stride_mb
    offs_t = tl.arange(0, TILE)
    found = 0
    for first in range(0, tiles, BATCH_OF_TILES):
        tile = first + tl.arange(0, BATCH_OF_TILES)
        exists = tile < tiles
        is_prefix = tile < prefix_tiles
        j0 = tl.where(is_prefix, tile * TILE, start + (tile - prefix_tiles) * TILE)
        offs_j = j0[:, None] + offs_t[None, :]
        low = tl.where(is_prefix, 0, prefix)[:, None]
        high = tl.where(is_prefix, prefix, length)[:, None]
        inside = (offs_j >= low) & (offs_j < high) & exists[:, None]
        valid = tl.load(mask_base + offs_j * stride_mn, mask=inside, other=0) != 0
        count = tl.sum(valid.to(tl.int32), 1)
        occupied_here = (count > 0).to(tl.int32)
        rank = found + tl.cumsum(occupied_here, 0) - occupied_here
        tl.store(base + tile, rank, mask=exists)
        tl.store(base + list_size + rank, tile, mask=exists & (count > 0))
        tl.store(base + 2 * list_size + tile, count, mask=exists)
        found += tl.sum(occupied_here, 0)
    tl.store(base + tiles, found)
