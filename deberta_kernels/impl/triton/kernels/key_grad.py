"""Gradients of keys and values: one program per tile of keys, which meets the queries."""

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
    load_pairs,
    load_table_row,
    load_tokens,
    near_reach,
    sequence,
    slanted,
    store_rows,
)
from deberta_kernels.impl.triton.kernels.scores import (
    allowed,
    far_query,
    near_score,
    score_gradient,
    valid_keys,
    weights,
)
from deberta_kernels.impl.triton.kernels.tile_list import ALL, ROWS, is_partial, kind_range, listed, occupied

__all__ = ["_disentangled_bwd_dkv_kernel"]


@triton.jit
def _load_queries(queries, stats, stats_size, kind, first_row, i0, nq, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  MASKED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Return q, dout and the statistics of a tile of queries, see `load_pairs`.

    In float32 all that the weights p are multiplied by comes multiplied by the factor that `weights` asks for.
    """
    offs_i = i0 + tl.arange(0, TILE)
    m_mask = offs_i < nq
    shift, out_dot_dout = load_pairs(stats, kind, stats_size, first_row + offs_i, m_mask)
    row_valid = m_mask
    if MASKED:
        row_valid = shift != -float("inf")
    q, dout = load_tokens(queries, i0, tl.arange(0, TILE), tl.arange(0, BLOCK_D), row_valid, HEAD_DIM, BLOCK_D)
    if q.dtype == tl.float32:
        factor = tl.load(stats + 6 * stats_size + first_row + offs_i, mask=m_mask, other=1.0)
        dout *= factor[:, None]
        out_dot_dout *= factor
    return q, dout, shift, out_dot_dout


@triton.jit
def _dkv_far_zones(
    k, v, valid, partial, queries, stats, stats_size, first_row, masks, tables, place, drop, row_list, row_list_size,
    tile, j0, row_tiles, near_start, near_stop, qk_scale, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what the saturated queries add to dk and dv, above (side 0, smallest distances) and below (side 1).

    For a tile of prefix keys all queries are on side 1, without a position.
    """
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_d = tl.arange(0, BLOCK_D)
    positioned = (tile >= prefix_tiles).to(tl.int32)
    dk = tl.zeros([TILE, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE, BLOCK_D], tl.float32)
    for side in range(2):
        n0 = tl.where(side == 0, 0, near_stop)
        n1 = tl.where(side == 0, near_start, row_tiles)
        if MASKED:
            n0, n1 = kind_range(row_list, row_list_size, n0, n1, ALL)
        if n0 < n1:
            pos_row = tl.zeros([BLOCK_D], tl.float32)
            if HAS_BIAS:
                pos_row = load_table_row(pos_query, side * (table_rows - 1), offs_d, positioned, BLOCK_D)
            for n in range(n0, n1):
                tile_row = n
                if MASKED:
                    tile_row = listed(row_list, row_list_size, n, ALL)
                i0 = tile_row * TILE
                q, dout, shift, out_dot_dout = _load_queries(
                    queries, stats, stats_size, positioned * (1 + side), first_row, i0, nq, HEAD_DIM, BLOCK_D, MASKED,
                    TILE,
                )  # fmt: skip
                if HAS_BIAS:
                    q = far_query(q, pos_row)
                if q.dtype == tl.float32:
                    score = tl.dot(q, k.T, input_precision=PRECISION).T
                else:
                    score = tl.dot(k, q.T, input_precision=PRECISION)
                score = allowed(score, valid, partial, masks, place, i0, j0, True, MASKED, TILE)
                p = weights(score, shift[None, :], qk_scale, q)
                dp = tl.dot(v, dout.T, input_precision=PRECISION)
                p, ds = score_gradient(p, dp, out_dot_dout[None, :], drop, i0, j0, keep_scale, True, DROPOUT, TILE)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_near_zone(
    k, v, dk, dv, valid, partial, queries, stats, stats_size, first_row, masks, tables, dpos, place, drop, tile, j0,
    near_start, near_stop, qk_scale, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dk and dv with what the near queries add.

    Here rows are keys: the distance of a pair from that of the first one is column - row.

    Args:
        dpos: float32 sums of the gradient of the expanded pos_query of this head; what is added where FUSED.
    """
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    block = (near_start - tile + prefix_tiles - 1) * TILE + prefix - key_start + table_offset
    query_block = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
    zero = layout_of_rows(tl.dot(k, query_block.T, input_precision=PRECISION), near_start)
    index = slanted(TILE, 1, zero)
    by_query = slanted(TILE, 0, zero)
    back = slanted(TILE, 2, zero)
    low = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
    ds_before = tl.zeros([TILE, TILE], k.dtype)
    for tile_row in tl.range(near_start, near_stop, num_stages=1):
        i0 = tile_row * TILE
        q, dout, shift, out_dot_dout = _load_queries(
            queries, stats, stats_size, 0, first_row, i0, nq, HEAD_DIM, BLOCK_D, MASKED, TILE
        )
        block += TILE
        high_query_block = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
        high = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
        if q.dtype == tl.float32:
            score = near_score(q, k, low, high, query_block, high_query_block, by_query, TILE, PRECISION).T
        else:
            score = near_score(k, q, query_block, high_query_block, low, high, index, TILE, PRECISION)
        low = high
        score = allowed(score, valid, partial, masks, place, i0, j0, True, MASKED, TILE)
        p = weights(score, shift[None, :], qk_scale, q)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        p, ds = score_gradient(p, dp, out_dot_dout[None, :], drop, i0, j0, keep_scale, True, DROPOUT, TILE)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        block_ds = along_two_rows(ds_before, ds, back, TILE)
        ds_before = ds
        dk = tl.dot(block_ds, query_block, dk, input_precision=PRECISION)
        if FUSED:
            dquery = tl.dot(block_ds.T, k, input_precision=PRECISION)
            add_block(dpos, block - TILE, offs_t, offs_d, dquery, BLOCK_D)
        query_block = high_query_block
    last_ds = along_two_rows(ds_before, tl.zeros_like(ds_before), back, TILE)
    if FUSED:
        add_block(dpos, block, offs_t, offs_d, tl.dot(last_ds.T, k, input_precision=PRECISION), BLOCK_D)
    dk = tl.dot(last_ds, query_block, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def _disentangled_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, stats_ptr, dmean_ptr, near_ptr, pos_key_ptr, pos_query_ptr,
    key_mask_ptr, pair_mask_ptr, tile_list_ptr, row_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_mb: tl.int64, stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64,
    stride_pn: tl.int64, heads, nq, nk, prefix, packed, key_tiles, list_size, row_list_size, low_end, high_start,
    table_offset, table_rows, stats_size: tl.int64, threshold, has_pair, qk_scale, scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys; tiles are (keys, queries); the grid is (B * H * key_tiles,).

    Where FUSED, the gradients of pos_query for near pairs are added to near: (2 tables, H, table_rows, BLOCK_D)
    float32.
    """
    # Program ids.
    pid = tl.program_id(0)
    batch_head = pid // key_tiles
    tile = pid % key_tiles
    b = batch_head // heads
    h = batch_head % heads
    batch = tl.where(packed != 0, 0, b).to(tl.int64)
    query_rows = nq
    key_rows = nk
    start, nq, nk = sequence(cu_seqlens_ptr, packed, b, nq, nk)
    if not HAS_BIAS:
        prefix = nk
    prefix_tiles, tiles, key_start = key_segments(nk, prefix, TILE)
    if tile >= tiles:
        return
    row_tiles = tl.cdiv(nq, TILE)

    # Offsets, and what stays for the whole loop.
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    is_prefix = tile < prefix_tiles
    j0 = tl.where(is_prefix, tile * TILE, key_start + (tile - prefix_tiles) * TILE)
    first_key = tl.where(is_prefix, 0, prefix)
    last_key = tl.where(is_prefix, prefix, nk)
    n_mask = (j0 + offs_t >= first_key) & (j0 + offs_t < last_key)
    valid = valid_keys(j0 + offs_t, first_key, last_key, key_mask_ptr + b * stride_mb, MASKED)
    partial = (j0 < first_key) | (j0 + TILE > last_key)
    row_list = row_list_ptr + b.to(tl.int64) * row_list_size * ROWS
    tile_list = tile_list_ptr + b.to(tl.int64) * list_size * ROWS
    if MASKED:
        partial = is_partial(tile_list, list_size, tile, TILE)
        n0, n1 = kind_range(tile_list, list_size, tile, tile + 1, ALL)
        row_tiles = tl.where(n0 < n1, row_tiles, 0)
    first_row = (start + j0).to(tl.int64)
    first_token = start.to(tl.int64)
    k_base = k_ptr + (batch * stride_kb + h * stride_kh + first_token * stride_kn) * UNIT
    v_base = v_ptr + (batch * stride_vb + h * stride_vh + first_token * stride_vn) * UNIT
    q_base = q_ptr + (batch * stride_qb + h * stride_qh + first_token * stride_qn) * UNIT
    dout_base = dout_ptr + (batch * stride_ob + h * stride_oh + first_token * stride_on) * UNIT
    queries = (q_base, dout_base, stride_qn * UNIT, stride_on * UNIT)
    first_query = (batch * heads + h) * query_rows + start
    pair_mask = pair_mask_ptr + b * stride_pb + h * stride_ph
    masks = (key_mask_ptr, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn)
    table = h.to(tl.int64) * table_rows * BLOCK_D
    tables = (pos_key_ptr + table, pos_query_ptr + table, table_rows, table_offset)
    place = (nq, nk, prefix, prefix_tiles, tiles, key_start)
    drop = (seed_ptr, batch_head, threshold)
    keys = (k_base, v_base, stride_kn * UNIT, stride_vn * UNIT)
    k, v = load_tokens(keys, j0, offs_t, offs_d, valid, HEAD_DIM, BLOCK_D)

    # Loops.
    near_start = 0
    near_stop = 0
    if HAS_BIAS:
        left, right = near_reach(prefix - key_start, low_end, high_start, TILE)
        position_tile = tile - prefix_tiles
        near_start = tl.where(is_prefix, 0, tl.minimum(tl.maximum(position_tile + 1 - right, 0), row_tiles))
        near_stop = tl.where(is_prefix, 0, tl.minimum(tl.maximum(position_tile + left, 0), row_tiles))
    dk, dv = _dkv_far_zones(
        k, v, valid, partial, queries, stats_ptr, stats_size, first_query, masks, tables, place, drop, row_list,
        row_list_size, tile, j0, row_tiles, near_start, near_stop, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE,
        HAS_BIAS, MASKED, DROPOUT, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        if MASKED:
            near_start, near_stop = occupied(row_list, row_list_size, near_start, near_stop)
        if near_start < near_stop:
            dpos = near_ptr + heads.to(tl.int64) * table_rows * BLOCK_D + table
            dk, dv = _dkv_near_zone(
                k, v, dk, dv, valid, partial, queries, stats_ptr, stats_size, first_query, masks, tables, dpos, place,
                drop, tile, j0, near_start, near_stop, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE, MASKED, DROPOUT,
                FUSED, PRECISION,
            )  # fmt: skip

    # Epilogue and stores.
    if MASKED:
        dmean = tl.load(dmean_ptr + batch_head * BLOCK_D + offs_d)
        dv += dmean[None, :]
    target = ((batch * key_rows + first_row) * heads + h) * HEAD_DIM
    store_rows(dk_ptr + target, offs_t, offs_d, heads * HEAD_DIM, n_mask, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + target, offs_t, offs_d, heads * HEAD_DIM, n_mask, dv, HEAD_DIM, BLOCK_D)
