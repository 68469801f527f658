"""Attend in one pass: one program per tile of queries, keys in up to four zones (prefix, far left, near, far right)."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import (
    LN2_HIGH,
    LN2_LOW,
    POINTERS,
    RUNTIME,
    kept,
    key_segments,
    layout_of_rows,
    load_block,
    load_rows,
    load_table_row,
    load_tokens,
    near_reach,
    sequence,
    slanted,
    store_rows,
)
from deberta_kernels.impl.triton.kernels.scores import allowed, far_constant, far_query, near_score, valid_keys
from deberta_kernels.impl.triton.kernels.tile_list import (
    FULL,
    PARTIAL,
    ROWS,
    is_partial,
    kind_range,
    listed,
    occupied,
)

__all__ = ["_disentangled_fwd_kernel"]


@triton.jit
def unit_of_maximum(x, qk_scale):
    """Return what the running maximum is multiplied by for units of log2, given a tensor of the inputs' dtype.

    For float32 the maximum is subtracted from raw scores, before scaling: one more operation, and the difference of two
    large scores is exact. Elsewhere scaling and subtraction are one operation.
    """
    if x.dtype == tl.float32:
        return qk_scale
    else:
        return 1.0


@triton.jit
def _online_softmax(
    score, m, total, acc, v, drop, i0, j0, qk_scale, GUARD: tl.constexpr, DROPOUT: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of scores into the running maximum m, sum of exponentials `total` and values acc.

    A pair's full score is score * qk_scale, in units of log2; m is in units of `unit_of_maximum`. GUARD: a row may have
    no key so far.
    """
    if v.dtype == tl.float32:
        new_m = tl.maximum(m, tl.max(score, 1))
    else:
        new_m = tl.maximum(m, tl.max(score, 1) * qk_scale)
    base = new_m
    if GUARD:
        base = tl.where(new_m == -float("inf"), 0.0, new_m)  # exp2(-inf - 0) is 0, exp2(-inf + inf) is NaN
    if v.dtype == tl.float32:
        p = tl.exp2((score - base[:, None]) * qk_scale)
        alpha = tl.exp2((m - base) * qk_scale)
    else:
        p = tl.exp2(score * qk_scale - base[:, None])
        alpha = tl.exp2(m - base)
    total = total * alpha + tl.sum(p, 1)
    if DROPOUT:
        seed_ptr, batch_head, threshold = drop
        p = tl.where(kept(seed_ptr, batch_head, i0, j0, threshold, False, TILE), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return new_m, total, acc


@triton.jit
def _zone_ranges(
    tile_list, list_size, first_tile, last_tile, first_partial, last_partial, MASKED: tl.constexpr
):  # fmt: skip
    """Return [full_start, full_stop) and [part_start, part_stop), the loops over the tiles [first_tile, last_tile).

    Without masks only the first and the last tile can be partial: entries 0 and 1 of the second loop.
    """
    if MASKED:
        full_start, full_stop = kind_range(tile_list, list_size, first_tile, last_tile, FULL)
        part_start, part_stop = kind_range(tile_list, list_size, first_tile, last_tile, PARTIAL)
    else:
        full_start = tl.minimum(first_tile + first_partial.to(tl.int32), last_tile)
        full_stop = tl.maximum(last_tile - last_partial.to(tl.int32), full_start)
        part_start = 1 - (full_start - first_tile)
        part_stop = 1 + (last_tile - full_stop)
    return full_start, full_stop, part_start, part_stop


@triton.jit
def _far_zones(
    q, m, total, acc, keys, masks, tables, place, drop, i0, near_start, near_stop, qk_scale, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the prefix keys, then to the saturated keys on the left and on the right: plain attention each."""
    key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    for zone in range(3 if HAS_BIAS else 1):
        first_tile = tl.where(zone == 0, 0, tl.where(zone == 1, prefix_tiles, near_stop))
        last_tile = tl.where(zone == 0, prefix_tiles, tl.where(zone == 1, near_start, tiles))
        if first_tile < last_tile:
            origin = tl.where(zone == 0, 0, key_start - prefix_tiles * TILE)
            first_key = tl.where(zone == 0, 0, prefix)
            last_key = tl.where(zone == 0, prefix, nk)
            far_q = q
            row = tl.zeros([TILE], tl.float32)
            if HAS_BIAS:
                side_row = tl.where(zone == 1, table_rows - 1, 0)
                far_q = far_query(q, load_table_row(pos_query, side_row, offs_d, zone, BLOCK_D))
                row = far_constant(q, load_table_row(pos_key, side_row, offs_d, zone, BLOCK_D))
                row = row * (qk_scale / unit_of_maximum(q, qk_scale))
            m -= row  # inside a zone its row constant is left out of scores and maximum alike
            full_start, full_stop, part_start, part_stop = _zone_ranges(
                tile_list, list_size, first_tile, last_tile, origin + first_tile * TILE < first_key,
                origin + last_tile * TILE > last_key, MASKED,
            )  # fmt: skip
            for n in range(full_start, full_stop):
                tile = n
                if MASKED:
                    tile = listed(tile_list, list_size, n, FULL)
                j0 = origin + tile * TILE
                k, v = load_tokens(keys, j0, offs_t, offs_d, None, HEAD_DIM, BLOCK_D)
                score = tl.dot(far_q, k.T, input_precision=PRECISION)
                m, total, acc = _online_softmax(
                    score, m, total, acc, v, drop, i0, j0, qk_scale, False, DROPOUT, TILE, PRECISION
                )
            for n in tl.range(part_start, part_stop, num_stages=1):
                tile = tl.where(n == 0, first_tile, last_tile - 1)
                if MASKED:
                    tile = listed(tile_list, list_size, n, PARTIAL)
                j0 = origin + tile * TILE
                valid = valid_keys(j0 + offs_t, first_key, last_key, key_mask, MASKED)
                k, v = load_tokens(keys, j0, offs_t, offs_d, valid, HEAD_DIM, BLOCK_D)
                score = tl.dot(far_q, k.T, input_precision=PRECISION)
                score = allowed(score, valid, True, masks, place, i0, j0, False, MASKED, TILE)
                m, total, acc = _online_softmax(
                    score, m, total, acc, v, drop, i0, j0, qk_scale, MASKED, DROPOUT, TILE, PRECISION
                )
            m += row
    return m, total, acc


@triton.jit
def _near_zone(
    q, m, total, acc, keys, masks, tables, place, drop, i0, near_start, near_stop, qk_scale, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to linear and logarithmic distances, and to the tiles where they meet the saturated ones."""
    key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    block = i0 - (near_start - prefix_tiles) * TILE + prefix - key_start + table_offset
    key_block = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
    index = slanted(TILE, 0, layout_of_rows(tl.dot(q, key_block.T, input_precision=PRECISION), near_start))
    high = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
    for tile in tl.range(near_start, near_stop, num_stages=1):
        j0 = key_start + (tile - prefix_tiles) * TILE
        valid = valid_keys(j0 + offs_t, prefix, nk, key_mask, MASKED)
        partial = (j0 < prefix) | (j0 + TILE > nk)
        if MASKED:
            partial = is_partial(tile_list, list_size, tile, TILE)
        k, v = load_tokens(keys, j0, offs_t, offs_d, valid, HEAD_DIM, BLOCK_D)
        block -= TILE
        low = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
        low_key_block = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
        score = near_score(q, k, low_key_block, key_block, low, high, index, TILE, PRECISION)
        high = low
        key_block = low_key_block
        score = allowed(score, valid, partial, masks, place, i0, j0, False, MASKED, TILE)
        m, total, acc = _online_softmax(
            score, m, total, acc, v, drop, i0, j0, qk_scale, MASKED, DROPOUT, TILE, PRECISION
        )
    return m, total, acc


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def _disentangled_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pos_key_ptr, pos_query_ptr, mean_ptr,
    key_mask_ptr, query_mask_ptr, pair_mask_ptr, tile_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_mb: tl.int64, stride_ub: tl.int64,
    stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64, stride_pn: tl.int64, heads, nq, nk, prefix, packed,
    row_tiles, list_size, low_end, high_start, table_offset, table_rows, threshold, has_pair, qk_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one tile of queries; the grid is (B * H * row_tiles,)."""
    # Program ids.
    pid = tl.program_id(0)
    batch_head = pid // row_tiles
    tile_row = pid % row_tiles
    b = batch_head // heads
    h = batch_head % heads
    batch = tl.where(packed != 0, 0, b).to(tl.int64)
    memory_rows = nq
    start, nq, nk = sequence(cu_seqlens_ptr, packed, b, nq, nk)
    i0 = tile_row * TILE
    if i0 >= nq:
        return
    if not HAS_BIAS:
        prefix = nk  # a key without a position is a prefix key
    prefix_tiles, tiles, key_start = key_segments(nk, prefix, TILE)

    # Offsets, and what stays for the whole loop.
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    m_mask = i0 + offs_t < nq
    row_valid = m_mask
    if MASKED:
        row_valid = m_mask & (tl.load(query_mask_ptr + b * stride_ub + i0 + offs_t, mask=m_mask, other=0) != 0)
    first_row = (start + i0).to(tl.int64)
    stride_qn = stride_qn * UNIT
    stride_kn = stride_kn * UNIT
    stride_vn = stride_vn * UNIT
    q_base = q_ptr + (batch * stride_qb + h * stride_qh) * UNIT + first_row * stride_qn
    k_base = k_ptr + (batch * stride_kb + h * stride_kh) * UNIT + start.to(tl.int64) * stride_kn
    v_base = v_ptr + (batch * stride_vb + h * stride_vh) * UNIT + start.to(tl.int64) * stride_vn
    keys = (k_base, v_base, stride_kn, stride_vn)
    tile_list = tile_list_ptr + b.to(tl.int64) * list_size * ROWS
    pair_mask = pair_mask_ptr + b * stride_pb + h * stride_ph
    masks = (key_mask_ptr + b * stride_mb, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn)
    table = h.to(tl.int64) * table_rows * BLOCK_D
    tables = (pos_key_ptr + table, pos_query_ptr + table, table_rows, table_offset)
    place = (nq, nk, prefix, prefix_tiles, tiles, key_start)
    drop = (seed_ptr, batch_head, threshold)
    q = load_rows(q_base, offs_t, offs_d, stride_qn, row_valid, HEAD_DIM, BLOCK_D)
    m = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_D], tl.float32)

    # Loops.
    near_start = tiles
    near_stop = tiles
    if HAS_BIAS:
        left, right = near_reach(prefix - key_start, low_end, high_start, TILE)
        near_start = tl.minimum(prefix_tiles + tl.maximum(tile_row + 1 - left, 0), tiles)
        near_stop = tl.minimum(prefix_tiles + tl.maximum(tile_row + right, 0), tiles)
    m, total, acc = _far_zones(
        q, m, total, acc, keys, masks, tables, place, drop, i0, near_start, near_stop, qk_scale, HEAD_DIM, BLOCK_D,
        TILE, HAS_BIAS, MASKED, DROPOUT, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        if MASKED:
            near_start, near_stop = occupied(tile_list, list_size, near_start, near_stop)
        if near_start < near_stop:
            m, total, acc = _near_zone(
                q, m, total, acc, keys, masks, tables, place, drop, i0, near_start, near_stop, qk_scale, HEAD_DIM,
                BLOCK_D, TILE, MASKED, DROPOUT, PRECISION,
            )  # fmt: skip

    # Epilogue and stores.
    out = acc * (keep_scale / total)[:, None]
    wide = m.to(tl.float64) * unit_of_maximum(q, qk_scale) + tl.log2(total).to(tl.float64)
    lse = (wide * LN2_HIGH + wide * LN2_LOW).to(tl.float32)
    if MASKED:
        padded = (total == 0.0) | (row_valid == 0)
        mean = tl.load(mean_ptr + batch_head.to(tl.int64) * HEAD_DIM + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
        out = tl.where(padded[:, None], mean[None, :], out)
        lse = tl.where(padded, -float("inf"), lse)
    out_base = out_ptr + ((batch * memory_rows + first_row) * heads + h) * HEAD_DIM
    store_rows(out_base, offs_t, offs_d, heads * HEAD_DIM, m_mask, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (batch * heads + h) * memory_rows + first_row + offs_t, lse, mask=m_mask)
