"""The position terms of near tiles in the forward: products with table rows, brought from distances to pairs.

A program has ROWS queries, one or two groups of TILE, and meets TILE keys at a time. With x0 the distance of its first
pair, r and c the pair's places in its group and tile, and y = (r - c) mod TILE, group g reads the table row
x0 + g * TILE + y where r >= c ("high"), elsewhere TILE rows further down ("low"). `docs/gpu.md` derives it.

* Content to position: one product of the queries with TILE new rows per tile, rotated along its rows. The first group
  reads it now as its low block and for the next tile as its high one; the second group does so a tile later.
* Position to content: two products of ROWS table rows with the keys, high and low, of which the low one's rows are the
  next tile's high ones. Entry (y, c) is of the high block where y + c < TILE.

PACKED, for bfloat16: both terms are rounded before they are staged, as eager code rounds them, and two columns are
carried in one word. There the rows of a group are in reverse order, TILE - 1 - y, so that one comparison, of row and
column, tells for both terms what is high. float16 could overflow where a score does not; it and float32 are staged in
float32.
"""

# No postponed annotations here: Triton reads the annotations of kernels as objects.

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import difference, load_block, staged, staging_address

__all__ = ["content_term", "load_groups", "pairs", "position_term", "rotated_product", "shifted"]


@triton.jit
def _lead(ROWS: tl.constexpr, TILE: tl.constexpr, PLACE: tl.constexpr):
    """Return row mod TILE less column, (ROWS, TILE): its bits from the fourth on at PLACE, as a borrow reaches them.

    What differs between lanes and what differs between the registers of a lane are added last: for the compiler the
    second is a constant, and few values are different.
    """
    row = tl.arange(0, ROWS)
    col = tl.arange(0, TILE)
    of_lane = (((row & (TILE - 1)) >> 4) * (2 * PLACE) + (row & 7))[:, None] - (col & 6)[None, :]
    return of_lane + ((((row >> 3) & 1) * PLACE)[:, None] - ((col >> 3) * PLACE + (col & 1))[None, :])


@triton.jit
def pairs(ROWS: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Return what the pairs of a tile read where, four tensors of integers or truth values.

    Returns:
        the place of (r, y) in the staged product for content to position, (ROWS, TILE); that of (y, c) for position to
        content, (ROWS, TILE); which entries of the second product are of its high block, (ROWS, TILE); and which pairs
        read the high block of the first, (ROWS, TILE), or as masks of words of two columns, (ROWS, TILE // 2).
    """
    row = tl.arange(0, ROWS)
    col = tl.arange(0, TILE)
    if PACKED:
        # The places of `staging_address`, by additions that a compiler can take apart.
        y = _lead(ROWS, TILE, 64) & ((TILE - 8) * 8 + 7)
        by_rows = y + ((row >> 4) * (16 * TILE) + (row & 7) * 8)[:, None] + (((row >> 3) & 1) * (8 * TILE))[:, None]
        y = _lead(ROWS, TILE, TILE) & ((TILE - 8) * (TILE // 8) + 7)
        last = (row & -TILE) * TILE + ((TILE - 8) * (TILE // 8) + 7) * 8
        by_columns = (last[:, None] + (col & 6)[None, :]) - y * 8 + ((col >> 3) * 64 + (col & 1))[None, :]
        half = tl.arange(0, TILE // 2)
        ahead = (((row & (TILE - 1)) >> 4) * 16 + (row & 7))[:, None] - (half * 2 & 6)[None, :]
        ahead += (((row >> 3) & 1) * 8)[:, None] - ((half >> 2) * 8)[None, :]
        columns = tl.minimum(tl.maximum(ahead, -1), 1) + 1  # of the two
        words = (columns >> 1) * -0x10000 + ((columns + 1) >> 1) * 0xFFFF
        return by_rows, by_columns, _lead(ROWS, TILE, 8) >= 0, words
    else:
        y = difference(TILE, ROWS)
        by_rows = staging_address(row[:, None] + tl.zeros_like(y), y, TILE, 32)
        by_columns = staging_address((row & -TILE)[:, None] | y, col[None, :] + tl.zeros_like(y), TILE, 32)
        r = (row & (TILE - 1))[:, None]
        return by_rows, by_columns, r + col[None, :] < TILE, r >= col[None, :]


@triton.jit
def _gathered(x, place, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Return the elements of x, staged, at each place."""
    ROWS: tl.constexpr = x.shape[0]
    if PACKED:
        x = x.to(tl.bfloat16)
    return tl.gather(staged(x, ROWS, TILE), place.reshape(ROWS * TILE), 0).reshape(ROWS, TILE)


@triton.jit
def rotated_product(q, block, by_rows, TILE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """Return the product of the queries with TILE table rows, rotated: float32, or words of two columns."""
    x = _gathered(tl.dot(q, block.T, input_precision=PRECISION), by_rows, TILE, PACKED)
    if PACKED:
        low, high = x.to(tl.uint16, bitcast=True).reshape(x.shape[0], TILE // 2, 2).split()
        return low.to(tl.int32) | (high.to(tl.int32) << 16)
    else:
        return x


@triton.jit
def shifted(now, before, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Return what each group of queries reads of two rotated products: the second group is a tile behind."""
    ROWS: tl.constexpr = now.shape[0]
    if ROWS == TILE:
        return now
    else:
        second = -(tl.arange(0, ROWS) // TILE)[:, None] + tl.zeros_like(now).to(tl.int32)
        if PACKED:
            return (before & second) | (now & ~second)
        else:
            return tl.where(second != 0, before, now)


@triton.jit
def content_term(high, low, is_high, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Return content to position of each pair, float32, from two rotated products; `is_high` as masks where PACKED."""
    if PACKED:
        words = (high & is_high) | (low & ~is_high)
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -0x10000).to(tl.float32, bitcast=True)
        return tl.join(even, odd).reshape(words.shape[0], TILE)
    else:
        return tl.where(is_high, high, low)


@triton.jit
def load_groups(
    table, row, offs_d, ROWS: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Load ROWS consecutive rows of an expanded table; where PACKED each TILE of them in reverse order."""
    offs = tl.arange(0, ROWS)
    if PACKED:
        offs = offs ^ (TILE - 1)
    return load_block(table, row, offs, offs_d, BLOCK_D)


@triton.jit
def position_term(
    high, low, k, by_columns, is_high, TILE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return position to content of each pair, float32.

    Args:
        high: table rows of the tile's high block, as `load_groups` gives them.
        low: of its low block.
        k: the keys, (TILE, BLOCK_D).
        by_columns: see `pairs`.
        is_high: as there.
    """
    high = tl.dot(high, k.T, input_precision=PRECISION)
    low = tl.dot(low, k.T, input_precision=PRECISION)
    return _gathered(tl.where(is_high, high, low), by_columns, TILE, PACKED).to(tl.float32)
