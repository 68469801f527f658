"""Gradients of queries: one program per tile of them, which meets its keys as the forward did."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import (
    POINTERS,
    RUNTIME,
    add_block,
    along_two_rows,
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
    sum_of_products,
)
from deberta_kernels.impl.triton.kernels.scores import (
    after_dropout,
    allowed,
    far_query,
    near_score,
    sum_of_only_tile,
    valid_keys,
    weights,
)
from deberta_kernels.impl.triton.kernels.tile_list import ALL, ROWS, is_partial, kind_range, listed, occupied

__all__ = ["_disentangled_bwd_dq_kernel"]


@triton.jit
def _dq_far_zones(
    q, dout, stats, is_only, keys, masks, tables, place, drop, i0, near_start, near_stop, far_ptr, far_table, far_side,
    qk_scale, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what prefix keys and saturated keys add to dq and to the sums of p, and the sums of out * dout.

    What they add to the gradients of the saturated table rows is stored.

    Args:
        stats: (those of `load_pairs` of near keys, dlse, where the pairs are, B * H * Nq, which rows, which there are).
        far_ptr: where the sums of pos_key and the smallest distances of this tile go.
        far_table: from there to those of pos_query, in elements.
        far_side: from there to those of the largest distances.
    """
    key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    shift, out_dot_dout, dlse, pairs, stats_size, row, m_mask = stats
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    dq = tl.zeros([TILE, BLOCK_D], tl.float32)
    p_sum = tl.zeros([TILE], tl.float32)
    for zone in range(3 if HAS_BIAS else 1):
        n0 = tl.where(zone == 0, 0, tl.where(zone == 1, prefix_tiles, near_stop))
        n1 = tl.where(zone == 0, prefix_tiles, tl.where(zone == 1, near_start, tiles))
        if MASKED:
            n0, n1 = kind_range(tile_list, list_size, n0, n1, ALL)
        if n0 < n1:
            origin = tl.where(zone == 0, 0, key_start - prefix_tiles * TILE)
            first_key = tl.where(zone == 0, 0, prefix)
            last_key = tl.where(zone == 0, prefix, nk)
            far_q = q
            zone_shift = shift
            side_row = tl.where(zone == 1, table_rows - 1, 0)
            if HAS_BIAS:
                far_q = far_query(q, load_table_row(pos_query, side_row, offs_d, zone, BLOCK_D))
                kind = tl.where(zone == 0, 0, 3 - zone)  # zone 1 holds the largest distances
                zone_shift = tl.load(pairs + 2 * (kind * stats_size + row), mask=m_mask, other=-float("inf"))
            dq_zone = tl.zeros([TILE, BLOCK_D], tl.float32)
            ds_sum = tl.zeros([TILE], tl.float32)
            for n in range(n0, n1):
                tile = n
                if MASKED:
                    tile = listed(tile_list, list_size, n, ALL)
                j0 = origin + tile * TILE
                valid = valid_keys(j0 + offs_t, first_key, last_key, key_mask, MASKED)
                partial = (j0 < first_key) | (j0 + TILE > last_key)
                if MASKED:
                    partial = is_partial(tile_list, list_size, tile, TILE)
                k, v = load_tokens(keys, j0, offs_t, offs_d, valid, HEAD_DIM, BLOCK_D)
                score = tl.dot(far_q, k.T, input_precision=PRECISION)
                score = allowed(score, valid, partial, masks, place, i0, j0, False, MASKED, TILE)
                p = weights(score, zone_shift[:, None], qk_scale, q)
                dp = tl.dot(dout, v.T, input_precision=PRECISION)
                _, dp = after_dropout(p, dp, drop, i0, j0, keep_scale, False, DROPOUT, TILE)
                if q.dtype != tl.float32:
                    out_dot_dout = sum_of_only_tile(p, dp, out_dot_dout, dlse, is_only)
                ds = p * (dp - out_dot_dout[:, None])
                if q.dtype == tl.float32:
                    p_sum += tl.sum(p, 1)
                ds_sum += tl.sum(ds, 1)
                dq_zone = tl.dot(ds.to(k.dtype), k, dq_zone, input_precision=PRECISION)
            dq += dq_zone
            if HAS_BIAS:
                if zone > 0:
                    pos_row = load_table_row(pos_key, side_row, offs_d, zone, BLOCK_D)
                    dq += ds_sum[:, None] * pos_row[None, :]
                    far = far_ptr + (2 - zone) * far_side + offs_d
                    tl.store(far, sum_of_products(ds_sum[:, None], q.to(tl.float32), 0))
                    tl.store(far + far_table, tl.sum(dq_zone, 0))
    return dq, p_sum, out_dot_dout


@triton.jit
def _dq_near_zone(
    q, dout, stats, is_only, dq, p_sum, keys, masks, tables, dpos, place, drop, i0, near_start, near_stop, qk_scale,
    keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dq and the sums of p with what the near keys add, and the sums of out * dout.

    Args:
        dpos: float32 sums of the gradient of the expanded pos_key of this head; what is added where FUSED.
    """
    key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    shift, out_dot_dout, dlse, pairs, stats_size, row, m_mask = stats
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    block = i0 - (near_start - prefix_tiles) * TILE + prefix - key_start + table_offset
    key_block = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
    index = slanted(TILE, 0, layout_of_rows(tl.dot(q, key_block.T, input_precision=PRECISION), near_start))
    high = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
    ds_before = tl.zeros([TILE, TILE], q.dtype)
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
        score = allowed(score, valid, partial, masks, place, i0, j0, False, MASKED, TILE)
        p = weights(score, shift[:, None], qk_scale, q)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        _, dp = after_dropout(p, dp, drop, i0, j0, keep_scale, False, DROPOUT, TILE)
        if q.dtype != tl.float32:
            out_dot_dout = sum_of_only_tile(p, dp, out_dot_dout, dlse, is_only)
        ds = p * (dp - out_dot_dout[:, None])
        if q.dtype == tl.float32:
            p_sum += tl.sum(p, 1)
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        # ds by distance: what this tile and the one before it add to the rows of one table block.
        block_ds = along_two_rows(ds_before, ds, index, TILE)
        ds_before = ds
        dq = tl.dot(block_ds, key_block, dq, input_precision=PRECISION)
        if FUSED:
            dkey = tl.dot(block_ds.T, q, input_precision=PRECISION)
            add_block(dpos, block + TILE, offs_t, offs_d, dkey, BLOCK_D)
        key_block = low_key_block
    last_ds = along_two_rows(ds_before, tl.zeros_like(ds_before), index, TILE)
    if FUSED:
        add_block(dpos, block, offs_t, offs_d, tl.dot(last_ds.T, q, input_precision=PRECISION), BLOCK_D)
    return tl.dot(last_ds, key_block, dq, input_precision=PRECISION), p_sum, out_dot_dout


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def _disentangled_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, stats_ptr, far_ptr, near_ptr, pos_key_ptr, pos_query_ptr,
    key_mask_ptr, pair_mask_ptr, tile_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_mb: tl.int64, stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64,
    stride_pn: tl.int64, heads, nq, nk, prefix, packed, row_tiles, list_size, low_end, high_start, table_offset,
    table_rows, stats_size: tl.int64, far_size: tl.int64, threshold, has_pair, qk_scale, scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of queries and its share of the saturated rows' gradients; the grid is (B * H * row_tiles,).

    In float32 it also writes 1 / the sum of p of each query to the last row of the statistics (`weights`), in 16 bits a
    better sum of out * dout where one tile has all keys (`sum_of_only_tile`).

    Where FUSED, the gradients of pos_key for near pairs are added to near, (2 tables, H, table_rows, BLOCK_D) float32.

    far: (2 tables, 2 sides, H, far_size = B * row_tiles, BLOCK_D) float32; side 0 holds the smallest distances.
    """
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
        prefix = nk
    prefix_tiles, tiles, key_start = key_segments(nk, prefix, TILE)

    # Offsets, and what stays for the whole loop.
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    m_mask = i0 + offs_t < nq
    first_row = (start + i0).to(tl.int64)
    row = (batch * heads + h) * memory_rows + first_row + offs_t
    shift = tl.load(stats_ptr + 2 * row, mask=m_mask, other=-float("inf"))
    out_dot_dout = tl.load(stats_ptr + 2 * row + 1, mask=m_mask, other=0.0)
    dlse = out_dot_dout
    if q_ptr.dtype.element_ty != tl.float32:
        dlse = tl.load(stats_ptr + 6 * stats_size + row, mask=m_mask, other=0.0)
    stats = (shift, out_dot_dout, dlse, stats_ptr, stats_size, row, m_mask)
    row_valid = shift != -float("inf")
    stride_qn = stride_qn * UNIT
    stride_kn = stride_kn * UNIT
    stride_vn = stride_vn * UNIT
    stride_on = stride_on * UNIT
    q_base = q_ptr + (batch * stride_qb + h * stride_qh) * UNIT + first_row * stride_qn
    k_base = k_ptr + (batch * stride_kb + h * stride_kh) * UNIT + start.to(tl.int64) * stride_kn
    v_base = v_ptr + (batch * stride_vb + h * stride_vh) * UNIT + start.to(tl.int64) * stride_vn
    dout_base = dout_ptr + (batch * stride_ob + h * stride_oh) * UNIT + first_row * stride_on
    keys = (k_base, v_base, stride_kn, stride_vn)
    tile_list = tile_list_ptr + b.to(tl.int64) * list_size * ROWS
    pair_mask = pair_mask_ptr + b * stride_pb + h * stride_ph
    masks = (key_mask_ptr + b * stride_mb, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn)
    table = h.to(tl.int64) * table_rows * BLOCK_D
    tables = (pos_key_ptr + table, pos_query_ptr + table, table_rows, table_offset)
    place = (nq, nk, prefix, prefix_tiles, tiles, key_start)
    drop = (seed_ptr, batch_head, threshold)
    q = load_rows(q_base, offs_t, offs_d, stride_qn, row_valid, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_base, offs_t, offs_d, stride_on, row_valid, HEAD_DIM, BLOCK_D)

    # Loops.
    near_start = tiles
    near_stop = tiles
    if HAS_BIAS:
        left, right = near_reach(prefix - key_start, low_end, high_start, TILE)
        near_start = tl.minimum(prefix_tiles + tl.maximum(tile_row + 1 - left, 0), tiles)
        near_stop = tl.minimum(prefix_tiles + tl.maximum(tile_row + right, 0), tiles)
    first, last = 0, tiles
    if MASKED:
        first, last = kind_range(tile_list, list_size, 0, tiles, ALL)
    is_only = last - first == 1
    far = far_ptr + (h * far_size + b * row_tiles + tile_row) * BLOCK_D
    dq, p_sum, out_dot_dout = _dq_far_zones(
        q, dout, stats, is_only, keys, masks, tables, place, drop, i0, near_start, near_stop, far,
        2 * heads * far_size * BLOCK_D, heads * far_size * BLOCK_D, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE,
        HAS_BIAS, MASKED, DROPOUT, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        if MASKED:
            near_start, near_stop = occupied(tile_list, list_size, near_start, near_stop)
        if near_start < near_stop:
            dq, p_sum, out_dot_dout = _dq_near_zone(
                q, dout, stats, is_only, dq, p_sum, keys, masks, tables, near_ptr + table, place, drop, i0, near_start,
                near_stop, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE, MASKED, DROPOUT, FUSED, PRECISION,
            )  # fmt: skip

    # Stores.
    if q.dtype == tl.float32:
        # Queries without a key, and those that a NaN reached, keep a factor of 1.
        tl.store(stats_ptr + 6 * stats_size + row, 1.0 / tl.where(p_sum > 0.0, p_sum, 1.0), mask=m_mask)
    elif is_only:
        for kind in tl.static_range(3):
            tl.store(stats_ptr + 2 * (kind * stats_size + row) + 1, out_dot_dout, mask=m_mask)
    dq_base = dq_ptr + ((batch * memory_rows + first_row) * heads + h) * HEAD_DIM
    store_rows(dq_base, offs_t, offs_d, heads * HEAD_DIM, m_mask, dq * scale, HEAD_DIM, BLOCK_D)
