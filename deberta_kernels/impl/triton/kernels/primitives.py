"""What every kernel needs: tiles of tokens, gathers through shared memory, dropout.

Values that travel together are tuples, always in this order:

    keys     k, v of this sample and head, their row strides; queries: q, dout and theirs
    masks    key mask, tile list and its size (`tile_list`), pair mask, whether there is one, its strides
    tables   expanded pos_key and pos_query of this head, their rows, the row of distance 0
    place    nq, nk, prefix, tiles of prefix keys, all tiles, first key of the tiles with a position (`key_segments`)
    drop     pointer to the seed, b * H + h, threshold

MASKED says which masks a kernel is compiled for: 0 none, 1 of keys and queries, 2 of pairs as well. FENCED changes
nothing in the source: it tells the kernels apart that `fences` adds to.

Kernels run over keys in two segments: the prefix keys, which have no position, and the others, whose tiles start at a
multiple of `gpu_tables.PREFIX_STEP`.
"""

# No postponed annotations here: Triton reads the annotations of kernels as objects.

import triton
import triton.language as tl

from deberta_kernels.impl import gpu_tables

# log2(e). A constant reaches a kernel as float32: what it loses comes with it, for the few sums in float64.
LOG2E_HIGH = tl.constexpr(1.4426950216293335)
LOG2E_LOW = tl.constexpr(1.925962989091e-8)
LN2_HIGH = tl.constexpr(0.6931471824645996)
LN2_LOW = tl.constexpr(-1.904654323148e-9)
PREFIX_STEP = tl.constexpr(gpu_tables.PREFIX_STEP)

# Values that vary from call to call: compiling again for one of them would stall a user's step.
RUNTIME = (
    "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_ob", "stride_oh", "stride_on", "stride_mb", "stride_ub", "stride_pb", "stride_ph",
    "stride_pm", "stride_pn", "stride_lb", "stride_lh", "stride_ln", "heads", "nq", "nk", "prefix", "packed",
    "row_tiles", "key_tiles", "list_size", "row_list_size", "low_end", "high_start", "table_offset", "table_rows",
    "threshold", "has_pair", "has_dlse", "stats_size", "far_size", "samples", "first_diagonal", "parts", "n",
)  # fmt: skip
POINTERS = (
    "key_mask_ptr", "query_mask_ptr", "pair_mask_ptr", "tile_list_ptr", "row_list_ptr", "cu_seqlens_ptr", "seed_ptr",
    "dlse_ptr",
)  # fmt: skip


@triton.jit
def when(mask, flag):
    """Return mask where the integer scalar flag is not 0, else all False.

    `mask & (flag != 0)` says the same, but Triton's interpreter makes int32 of it, which masks no load.
    """
    return mask & ((tl.zeros_like(mask).to(tl.int32) + flag) != 0)


@triton.jit
def load_rows(base, offs_n, offs_d, stride, row_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (T, BLOCK_D) elements; rows outside row_mask (None: none are) and columns beyond HEAD_DIM are zero."""
    pointers = base + offs_n[:, None] * stride + offs_d[None, :]
    if row_mask is None:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :] & (offs_n >= 0)[:, None], other=0.0)
    else:
        mask = row_mask[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(base, offs_n, offs_d, stride, row_mask, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (T, BLOCK_D) elements, rounded to the dtype of the memory."""
    mask = row_mask[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    values = values.to(base.dtype.element_ty)
    tl.store(base + offs_n[:, None] * stride + offs_d[None, :], values, mask=mask)


@triton.jit
def load_pairs(stats, kind, stats_size, row, mask):
    """Return (row constant less log-sum-exp, sum of out * dout) of queries, see `_disentangled_bwd_preprocess_kernel`.

    Args:
        kind: 0 for near keys and for those without a position, 1 and 2 for those of the smallest and largest distances.
        stats_size: B * H * Nq.
        row: of each query among those, (T,).
        mask: which queries there are.
    """
    pointers = stats + 2 * (kind * stats_size + row)[:, None] + tl.arange(0, 2)[None, :]
    column = tl.arange(0, 2)[None, :]
    other = tl.where(column == 0, -float("inf"), 0.0) + tl.zeros_like(row)[:, None].to(tl.float32)
    return tl.load(pointers, mask=mask[:, None] & (column >= 0), other=other).split()


@triton.jit
def store_pairs(stats, kind, stats_size, row, shift, out_dot_dout, mask):
    """Store what `load_pairs` loads."""
    pointers = stats + 2 * (kind * stats_size + row)
    tl.store(pointers, shift, mask=mask)
    tl.store(pointers + 1, out_dot_dout, mask=mask)


@triton.jit
def load_block(table, row, offs_t, offs_d, BLOCK_D: tl.constexpr):
    """Load T consecutive rows of an expanded table, (T, BLOCK_D); the tables have a margin, so none is outside."""
    return tl.load(table + row * BLOCK_D + (offs_t[:, None] * BLOCK_D + offs_d[None, :]))


@triton.jit
def add_block(table, row, offs_t, offs_d, values, BLOCK_D: tl.constexpr):
    """Add (T, BLOCK_D) to T consecutive rows of the float32 sums of an expanded table, which other programs add to."""
    tl.atomic_add(table + row * BLOCK_D + (offs_t[:, None] * BLOCK_D + offs_d[None, :]), values, sem="relaxed")


@triton.jit
def load_table_row(table, row, offs_d, positioned, BLOCK_D: tl.constexpr):
    """Return one row of an expanded table, (BLOCK_D,) float32; zero where the integer `positioned` is 0."""
    mask = when(offs_d < BLOCK_D, positioned)
    return tl.load(table + row * BLOCK_D + offs_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sequence(cu_seqlens_ptr, packed, b, nq, nk):
    """Return the first token and the lengths (start, nq, nk) of sample or packed sequence b."""
    start = tl.load(cu_seqlens_ptr + b, mask=packed != 0, other=0)
    stop = tl.load(cu_seqlens_ptr + b + 1, mask=packed != 0, other=0)
    nq = tl.where(packed != 0, stop - start, nq)
    nk = tl.where(packed != 0, stop - start, nk)
    return start, nq, nk


@triton.jit
def key_segments(nk, prefix, TILE: tl.constexpr):
    """Return (prefix tiles, all tiles, first key of the tiles that have a position)."""
    prefix_tiles = tl.cdiv(prefix, TILE)
    start = prefix // PREFIX_STEP * PREFIX_STEP
    tiles = prefix_tiles + tl.where(nk > prefix, tl.cdiv(nk - start, TILE), 0)
    return prefix_tiles, tiles, start


@triton.jit
def near_reach(shift, low_end, high_start, TILE: tl.constexpr):
    """Return (left, right): the tile of queries I is near the key tiles I - left < J < I + right, and far from others.

    In a far tile every pair is saturated. `shift` is the distance of the pair (0, 0) of tiles I = J.
    """
    left = tl.cdiv(high_start + TILE - 1 - shift, TILE)
    right = tl.cdiv(shift + TILE - 1 - low_end, TILE)
    return left, right


@triton.jit
def difference(TILE: tl.constexpr):
    """Return (row - column) mod TILE, (TILE, TILE), in the factored form that keeps the gather cheap."""
    row = tl.arange(0, TILE)[:, None]
    col = tl.arange(0, TILE)[None, :]
    low = (row & 7) - (col & 7)
    return (low & 7) | ((((row >> 3) - (col >> 3) + (low >> 3)) << 3) & (TILE - 1))


@triton.jit
def total(TILE: tl.constexpr):
    """Return (row + column) mod TILE, (TILE, TILE), factored."""
    row = tl.arange(0, TILE)[:, None]
    col = tl.arange(0, TILE)[None, :]
    low = (row & 7) + (col & 7)
    return (low & 7) | ((((row >> 3) + (col >> 3) + (low >> 3)) << 3) & (TILE - 1))


@triton.jit
def staging_address(row, col, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Return where `staged` puts element (row, col): 8 x 8 blocks, in which no two lanes of a warp share a bank.

    32-bit elements also have the lowest column bit moved above the rows of the block: an accumulator's lane holds two
    neighbouring columns, and stores one of them at a time.
    """
    block = (row >> 3) * (8 * COLUMNS) + (col >> 3) * 64
    if BITS == 32:
        return block + (col & 1) * 32 + (row & 7) * 4 + ((col >> 1) & 3)
    else:
        return block + (row & 7) * 8 + (col & 7)


@triton.jit
def staged(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the elements of (ROWS, COLUMNS) in the order of `staging_address`, in one dimension."""
    if x.dtype.primitive_bitwidth == 32:
        blocks = x.reshape(ROWS // 8, 8, COLUMNS // 8, 4, 2).permute(0, 2, 4, 1, 3)
    else:
        blocks = x.reshape(ROWS // 8, 8, COLUMNS // 8, 8).permute(0, 2, 1, 3)
    return blocks.reshape(ROWS * COLUMNS)


@triton.jit
def along_rows(x, column, TILE: tl.constexpr):
    """Return x[row, column[row, col]], (TILE, TILE)."""
    row = tl.arange(0, TILE)[:, None] + tl.zeros_like(column)
    address = staging_address(row, column, TILE, x.dtype.primitive_bitwidth)
    return tl.gather(staged(x, TILE, TILE), address.reshape(TILE * TILE), 0).reshape(TILE, TILE)


@triton.jit
def along_columns(x, row, TILE: tl.constexpr):
    """Return x[row[row, col], col], (TILE, TILE)."""
    col = tl.arange(0, TILE)[None, :] + tl.zeros_like(row)
    address = staging_address(row, col, TILE, x.dtype.primitive_bitwidth)
    return tl.gather(staged(x, TILE, TILE), address.reshape(TILE * TILE), 0).reshape(TILE, TILE)


@triton.jit
def slanted(TILE: tl.constexpr, KIND: tl.constexpr, zero):
    """Return an index into two tiles beside or above each other: its low three bits, and the others as a sum of two.

    KIND: 0 TILE + row - column, 1 TILE + column - row, 2 row + column. No entry wraps around. The second part of the
    sum is a constant in every register of a lane: added last, it becomes part of the load.

    Args:
        zero: see `layout_of_rows`.
    """
    row = tl.arange(0, TILE)[:, None]
    col = tl.arange(0, TILE)[None, :]
    if KIND == 0:
        low = (row & 7) - (col & 7)
        return low & 7, (row >> 3) + (low >> 3) + TILE // 8, -(col >> 3), zero
    elif KIND == 1:
        low = (col & 7) - (row & 7)
        return low & 7, (low >> 3) - (row >> 3) + TILE // 8, col >> 3, zero
    else:
        low = (row & 7) + (col & 7)
        return low & 7, (low >> 3) + (row >> 3), col >> 3, zero


@triton.jit
def layout_of_rows(product, count):
    """Return zeros, (T,) int32, that the compiler takes for unknown numbers, and lays out as the rows of a product.

    A gather lies as its index does. What goes into a product next would have it in the order of memory, where its loads
    meet in banks and its result is staged once more; an index that these are added to keeps it in that of accumulators.

    Args:
        product: (T, T) float32, of `tl.dot`.
        count: an integer that is never negative, which the compiler does not know.
    """
    return tl.max(product, 1).to(tl.int32, bitcast=True) & tl.minimum(count, 0)


@triton.jit
def along_two_rows(left, right, index, TILE: tl.constexpr):
    """Return x[row, index[row, col]], (TILE, TILE), of x = left beside right; index as `slanted` returns it."""
    BITS: tl.constexpr = left.dtype.primitive_bitwidth
    x = tl.join(left, right).permute(0, 2, 1).reshape(TILE, 2 * TILE)
    low, high, step, zero = index
    row = tl.arange(0, TILE)[:, None]
    address = (row >> 3) * (16 * TILE) + high * 64 + staging_address(row & 7, low, 2 * TILE, BITS)
    address += zero[:, None]
    address += step * 64
    return tl.gather(staged(x, TILE, 2 * TILE), address.reshape(TILE * TILE), 0).reshape(TILE, TILE)


@triton.jit
def along_two_columns(top, bottom, index, TILE: tl.constexpr):
    """Return x[index[row, col], col], (TILE, TILE), of x = top above bottom; index as `slanted` returns it."""
    BITS: tl.constexpr = top.dtype.primitive_bitwidth
    x = tl.join(top, bottom).permute(2, 0, 1).reshape(2 * TILE, TILE)
    low, high, step, zero = index
    col = tl.arange(0, TILE)[None, :]
    address = high * (8 * TILE) + staging_address(low, col & 7, TILE, BITS)
    address += zero[:, None]
    address += step * (8 * TILE) + (col >> 3) * 64
    return tl.gather(staged(x, 2 * TILE, TILE), address.reshape(TILE * TILE), 0).reshape(TILE, TILE)


@triton.jit
def load_tokens(pair, n0, offs_t, offs_d, row_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a tile of two token tensors, keys and values or queries and dout; see `load_rows`.

    Args:
        pair: (pointer, pointer, row stride, row stride), of token 0 of this sample and head.
        n0: first token.
    """
    first, second, first_stride, second_stride = pair
    n = n0.to(tl.int64)
    x = load_rows(first + n * first_stride, offs_t, offs_d, first_stride, row_mask, HEAD_DIM, BLOCK_D)
    y = load_rows(second + n * second_stride, offs_t, offs_d, second_stride, row_mask, HEAD_DIM, BLOCK_D)
    return x, y


@triton.jit
def sum_of_products(a, b, AXIS: tl.constexpr):
    """Return the sums of a * b over one of two dimensions, of float32 products that are rounded.

    Where a lane has one product, the compiler would fuse it with what another lane sends, and that one fuses its own:
    both store a sum in the same place, and the two differ.
    """
    a, b = tl.broadcast(a, b)
    return tl.sum(tl.fma(a, b, tl.zeros_like(a)), AXIS)


@triton.jit
def kept(seed_ptr, batch_head, i0, j0, threshold, KEYS_FIRST: tl.constexpr, TILE: tl.constexpr):
    """Return which probabilities of a tile dropout keeps, (T, T) bool; `dropout.py` states the contract.

    Args:
        seed_ptr: one int64.
        batch_head: b * H + h.
        i0: first query of the tile; j0: first key, a multiple of 8.
        threshold: draws below it drop.
        KEYS_FIRST: keys by queries instead of queries by keys.
    """
    offs_t = tl.arange(0, TILE)
    offs_g = tl.arange(0, TILE // 8)
    if KEYS_FIRST:
        zero = tl.zeros([TILE // 8, TILE], tl.int32)
        group = (j0 >> 3) + offs_g[:, None] + zero
        row = i0 + offs_t[None, :] + zero
    else:
        zero = tl.zeros([TILE, TILE // 8], tl.int32)
        group = (j0 >> 3) + offs_g[None, :] + zero
        row = i0 + offs_t[:, None] + zero
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), group, row, zero + batch_head, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # words 0 to 3 in the order of the last two dimensions
    draws = tl.join(words & 0xFFFF, words >> 16)
    if KEYS_FIRST:
        draws = draws.permute(0, 2, 3, 4, 1)
    return draws.reshape(TILE, TILE).to(tl.int32) >= threshold
