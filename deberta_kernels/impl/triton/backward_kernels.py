"""Differentiate by recomputation: once with queries fixed (dq), once with keys fixed (dk, dv). No atomics anywhere."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.primitives import (
    LOG2E_HIGH,
    LOG2E_LOW,
    along_columns,
    along_rows,
    difference,
    far_operands,
    kept,
    key_segments,
    load_block,
    load_rows,
    load_tokens,
    near_reach,
    sequence,
    store_rows,
    total,
    two_blocks,
    valid_keys,
    when,
    without_pairs,
)
from deberta_kernels.impl.triton.tile_list import ALL, ROWS, is_partial, kind_range, listed, occupied

__all__ = ["bwd_dkv_kernel", "bwd_dq_kernel", "bwd_preprocess_kernel", "sum_kernel"]

RUNTIME = (
    "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_ob", "stride_oh", "stride_on", "stride_mb", "stride_pb",
    "stride_ph", "stride_pm", "stride_pn", "stride_lb", "stride_lh", "stride_ln", "heads", "nq", "nk", "prefix",
    "packed", "row_tiles", "key_tiles", "list_size", "row_list_size", "low_end", "high_start", "table_offset",
    "table_rows", "threshold", "has_pair", "has_dlse", "has_far", "stats_size", "far_size", "parts", "n",
)  # fmt: skip
POINTERS = (
    "key_mask_ptr", "pair_mask_ptr", "tile_list_ptr", "row_list_ptr", "cu_seqlens_ptr", "seed_ptr",
    "dlse_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def bwd_preprocess_kernel(
    q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, pos_key_ptr, stats_ptr, dmean_ptr, cu_seqlens_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_ln: tl.int64, heads, nq, nk, packed, row_tiles, table_rows,
    stats_size: tl.int64, has_dlse, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write what the other kernels need of each query; the grid is (B * H * row_tiles,).

    stats: (4, B, H, Nq) float32: the log-sum-exp in units of a raw score, +inf on padded rows; sum of out * dout less
    dlse; q . pos_key of the saturated distances, smallest, then largest.
    dmean: (B * H, row_tiles, BLOCK_D) float32: what the padded rows of the tile add to every dv.
    """
    pid = tl.program_id(0)
    batch_head = pid // row_tiles
    tile_row = pid % row_tiles
    b = batch_head // heads
    h = batch_head % heads
    batch = tl.where(packed != 0, 0, b).to(tl.int64)
    memory_rows = nq
    start, nq, nk = sequence(cu_seqlens_ptr, packed, b, nq, nk)
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    m_mask = tile_row * TILE + offs_t < nq
    first_row = (start + tile_row * TILE).to(tl.int64)
    stats = (batch * heads + h) * memory_rows + first_row + offs_t
    lse = tl.load(lse_ptr + stats, mask=m_mask, other=0.0)
    padded = lse == -float("inf")
    out_base = out_ptr + ((batch * memory_rows + first_row) * heads + h) * HEAD_DIM
    dout_base = dout_ptr + (batch * stride_ob + h * stride_oh + first_row * stride_on) * UNIT
    out = load_rows(out_base, offs_t, offs_d, heads * HEAD_DIM, m_mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    dout = load_rows(dout_base, offs_t, offs_d, stride_on * UNIT, m_mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    dlse_rows = b * stride_lb + h * stride_lh + (first_row + offs_t) * stride_ln
    dlse = tl.load(dlse_ptr + dlse_rows, mask=when(m_mask, has_dlse), other=0.0)
    out_dot_dout = tl.sum(out * dout, 1) - dlse
    # Rounded once: the weights are as exact as what is subtracted here, and a large score makes that coarse.
    wide = lse.to(tl.float64)
    raw = ((wide * LOG2E_HIGH + wide * LOG2E_LOW) / qk_scale).to(tl.float32)
    tl.store(stats_ptr + stats, tl.where(padded, float("inf"), raw), mask=m_mask)
    tl.store(stats_ptr + stats_size + stats, tl.where(padded, 0.0, out_dot_dout), mask=m_mask)
    if HAS_BIAS:
        q_base = q_ptr + (batch * stride_qb + h * stride_qh + first_row * stride_qn) * UNIT
        q = load_rows(q_base, offs_t, offs_d, stride_qn * UNIT, m_mask & (padded == 0), HEAD_DIM, BLOCK_D)
        pos_key = pos_key_ptr + h.to(tl.int64) * table_rows * BLOCK_D
        for side in tl.static_range(2):
            has_table = when(offs_d < BLOCK_D, table_rows)
            row = tl.load(pos_key + side * (table_rows - 1) * BLOCK_D + offs_d, mask=has_table, other=0.0).to(
                tl.float32
            )
            far = tl.sum(q.to(tl.float32) * row[None, :], 1)
            tl.store(stats_ptr + (2 + side) * stats_size + stats, far, mask=m_mask)
    if MASKED:
        dmean = tl.sum(tl.where((padded & m_mask)[:, None], dout, 0.0), 0) / nk
        tl.store(dmean_ptr + pid.to(tl.int64) * BLOCK_D + offs_d, dmean)


@triton.jit(do_not_specialize=("n",))
def sum_kernel(parts_ptr, sum_ptr, n, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Sum (groups, n, BLOCK_D) float32 over n, always in the same order; the grid is (groups,)."""
    offs_n = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    base = parts_ptr + tl.program_id(0).to(tl.int64) * n * BLOCK_D
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, n, ROWS):
        offs = (first + offs_n)[:, None].to(tl.int64) * BLOCK_D + offs_d[None, :]
        acc += tl.load(base + offs, mask=(first + offs_n < n)[:, None], other=0.0)
    tl.store(sum_ptr + tl.program_id(0) * BLOCK_D + offs_d, tl.sum(acc, 0))


@triton.jit
def score_gradient(
    score, shift, dp, out_dot_dout, drop, i0, j0, keep_scale, qk_scale, KEYS_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return (p after dropout, ds), ds without the factor `scale`; all (T, T) float32.

    Args:
        score: raw scores, -inf where forbidden; keys by queries when KEYS_FIRST, else queries by keys.
        shift: row constant less log-sum-exp, raw, broadcast along the keys; added before scaling, which is more exact.
        dp: dout . v, raw.
        out_dot_dout: broadcast along the keys.
    """
    p = tl.exp2((score + shift) * qk_scale)
    dropped = p
    if DROPOUT:
        seed_ptr, batch_head, threshold = drop
        keep = kept(seed_ptr, batch_head, i0, j0, threshold, KEYS_FIRST, TILE)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        dropped = tl.where(keep, p * keep_scale, 0.0)
    return dropped, p * (dp - out_dot_dout)


@triton.jit
def _dq_far_zones(
    q, dout, lse, out_dot_dout, keys, masks, tables, place, drop, i0, near_start, near_stop, far_ptr, far_table,
    far_side, qk_scale, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what prefix keys and saturated keys add to dq; store what they add to the saturated table rows.

    Args:
        far_ptr: where the sums of pos_key and the smallest distances of this tile go.
        far_table: from there to those of pos_query, in elements.
        far_side: from there to those of the largest distances.
    """
    key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    dq = tl.zeros([TILE, BLOCK_D], tl.float32)
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
            shift = -lse
            side_row = tl.where(zone == 1, table_rows - 1, 0)
            if HAS_BIAS:
                far_q, row = far_operands(q, pos_key, pos_query, side_row, offs_d, zone, BLOCK_D)
                shift = row - lse
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
                if partial:
                    score = tl.where(valid[None, :], score, -float("inf"))
                score = without_pairs(score, masks, place, i0, j0, False, MASKED, TILE)
                dp = tl.dot(dout, v.T, input_precision=PRECISION)
                _, ds = score_gradient(
                    score, shift[:, None], dp, out_dot_dout[:, None], drop, i0, j0, keep_scale, qk_scale, False,
                    DROPOUT, TILE,
                )  # fmt: skip
                ds_sum += tl.sum(ds, 1)
                dq_zone = tl.dot(ds.to(k.dtype), k, dq_zone, input_precision=PRECISION)
            dq += dq_zone
            if HAS_BIAS:
                if zone > 0:
                    pos_row = tl.load(pos_key + side_row * BLOCK_D + offs_d).to(tl.float32)
                    dq += ds_sum[:, None] * pos_row[None, :]
                    far = far_ptr + (2 - zone) * far_side + offs_d  # zone 1 holds the largest distances, side 1
                    tl.store(far, tl.sum(ds_sum[:, None] * q.to(tl.float32), 0))
                    tl.store(far + far_table, tl.sum(dq_zone, 0))
    return dq


@triton.jit
def _dq_near_zone(
    q, dout, lse, out_dot_dout, dq, keys, masks, tables, place, drop, i0, near_start, near_stop, qk_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dq with what the near keys add."""
    key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    distance = difference(TILE)
    high_row = offs_t[:, None] >= offs_t[None, :]
    upper = offs_t[:, None] + offs_t[None, :] < TILE
    block = i0 - (near_start - prefix_tiles) * TILE + prefix - key_start + table_offset
    key_block = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
    c2p_high = along_rows(tl.dot(q, key_block.T, input_precision=PRECISION), distance, TILE)
    high = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
    ds_high = tl.zeros([TILE, TILE], q.dtype)
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
        c2p_low = along_rows(tl.dot(q, low_key_block.T, input_precision=PRECISION), distance, TILE)
        bias = along_columns(two_blocks(high, low, upper, k, PRECISION), distance, TILE)
        bias += tl.where(high_row, c2p_high, c2p_low)
        c2p_high = c2p_low
        high = low
        score = tl.dot(q, k.T, bias, input_precision=PRECISION)
        if partial:
            score = tl.where(valid[None, :], score, -float("inf"))
        score = without_pairs(score, masks, place, i0, j0, False, MASKED, TILE)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        _, ds = score_gradient(
            score, -lse[:, None], dp, out_dot_dout[:, None], drop, i0, j0, keep_scale, qk_scale, False, DROPOUT, TILE
        )
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        # ds by distance: what this tile and the one before it add to the rows of one table block.
        by_distance = along_rows(ds, distance, TILE)
        block_ds = tl.where(high_row, by_distance, ds_high)
        ds_high = by_distance
        dq = tl.dot(block_ds, key_block, dq, input_precision=PRECISION)
        key_block = low_key_block
    last_ds = tl.where(high_row, tl.zeros_like(ds_high), ds_high)
    return tl.dot(last_ds, key_block, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, stats_ptr, far_ptr, pos_key_ptr, pos_query_ptr,
    key_mask_ptr, pair_mask_ptr, tile_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_mb: tl.int64, stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64,
    stride_pn: tl.int64, heads, nq, nk, prefix, packed, row_tiles, list_size, low_end, high_start, table_offset,
    table_rows, stats_size: tl.int64, far_size: tl.int64, threshold, has_pair, qk_scale, scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of queries and its share of the saturated rows' gradients; the grid is (B * H * row_tiles,).

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
    stats = stats_ptr + (batch * heads + h) * memory_rows + first_row + offs_t
    lse = tl.load(stats, mask=m_mask, other=float("inf"))
    out_dot_dout = tl.load(stats + stats_size, mask=m_mask, other=0.0)
    row_valid = lse != float("inf")
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
    far = far_ptr + (h * far_size + b * row_tiles + tile_row) * BLOCK_D
    dq = _dq_far_zones(
        q, dout, lse, out_dot_dout, keys, masks, tables, place, drop, i0, near_start, near_stop, far,
        2 * heads * far_size * BLOCK_D, heads * far_size * BLOCK_D, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE,
        HAS_BIAS, MASKED, DROPOUT, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        if MASKED:
            near_start, near_stop = occupied(tile_list, list_size, near_start, near_stop)
        if near_start < near_stop:
            dq = _dq_near_zone(
                q, dout, lse, out_dot_dout, dq, keys, masks, tables, place, drop, i0, near_start, near_stop, qk_scale,
                keep_scale, HEAD_DIM, BLOCK_D, TILE, MASKED, DROPOUT, PRECISION,
            )  # fmt: skip

    # Stores.
    dq_base = dq_ptr + ((batch * memory_rows + first_row) * heads + h) * HEAD_DIM
    store_rows(dq_base, offs_t, offs_d, heads * HEAD_DIM, m_mask, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _load_queries(queries, stats, stats_size, i0, offs_t, offs_d, nq, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  MASKED: tl.constexpr):  # fmt: skip
    """Return q, dout, log2 of the denominators (+inf on padded rows) and sums of out * dout of a tile of queries."""
    m_mask = i0 + offs_t < nq
    lse = tl.load(stats + i0 + offs_t, mask=m_mask, other=float("inf"))
    out_dot_dout = tl.load(stats + stats_size + i0 + offs_t, mask=m_mask, other=0.0)
    row_valid = m_mask
    if MASKED:
        row_valid = lse != float("inf")
    q, dout = load_tokens(queries, i0, offs_t, offs_d, row_valid, HEAD_DIM, BLOCK_D)
    return q, dout, lse, out_dot_dout


@triton.jit
def _dkv_far_zones(
    k, v, valid, partial, queries, stats, stats_size, masks, tables, place, drop, row_list, row_list_size, tile, j0,
    row_tiles, near_start, near_stop, qk_scale, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what the saturated queries add to dk and dv, above (side 0, smallest distances) and below (side 1).

    For a tile of prefix keys all queries are on side 1, without a position.
    """
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
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
                far_row = pos_query + side * (table_rows - 1) * BLOCK_D + offs_d
                pos_row = tl.load(far_row, mask=when(offs_d < BLOCK_D, positioned), other=0.0).to(tl.float32)
            for n in range(n0, n1):
                tile_row = n
                if MASKED:
                    tile_row = listed(row_list, row_list_size, n, ALL)
                i0 = tile_row * TILE
                q, dout, lse, out_dot_dout = _load_queries(
                    queries, stats, stats_size, i0, offs_t, offs_d, nq, HEAD_DIM, BLOCK_D, MASKED
                )
                shift = -lse
                if HAS_BIAS:
                    # The same rounding as in `far_operands`.
                    q = (q.to(tl.float32) + pos_row[None, :]).to(q.dtype)
                    has_row = when(i0 + offs_t < nq, positioned)
                    shift += tl.load(stats + (2 + side) * stats_size + i0 + offs_t, mask=has_row, other=0.0)
                score = tl.dot(k, q.T, input_precision=PRECISION)
                if partial:
                    score = tl.where(valid[:, None], score, -float("inf"))
                score = without_pairs(score, masks, place, i0, j0, True, MASKED, TILE)
                dp = tl.dot(v, dout.T, input_precision=PRECISION)
                p, ds = score_gradient(
                    score, shift[None, :], dp, out_dot_dout[None, :], drop, i0, j0, keep_scale, qk_scale, True, DROPOUT,
                    TILE,
                )  # fmt: skip
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_near_zone(
    k, v, dk, dv, valid, partial, queries, stats, stats_size, masks, tables, place, drop, tile, j0, near_start,
    near_stop, qk_scale, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dk and dv with what the near queries add.

    Here rows are keys: y = (column - row) mod T, and the high block serves the columns >= rows. In the product of a
    block with the queries, row y of query r is of the high block where y <= r, the same condition.
    """
    pos_key, pos_query, table_rows, table_offset = tables
    nq, nk, prefix, prefix_tiles, tiles, key_start = place
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    distance = (TILE - difference(TILE)) & (TILE - 1)
    back = total(TILE)
    high_pair = offs_t[:, None] <= offs_t[None, :]
    below = offs_t[:, None] + offs_t[None, :] < TILE
    block = (near_start - tile + prefix_tiles - 1) * TILE + prefix - key_start + table_offset
    query_block = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
    p2c_low = along_rows(tl.dot(k, query_block.T, input_precision=PRECISION), distance, TILE)
    low = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
    ds_low = tl.zeros([TILE, TILE], k.dtype)
    for tile_row in tl.range(near_start, near_stop, num_stages=1):
        i0 = tile_row * TILE
        q, dout, lse, out_dot_dout = _load_queries(
            queries, stats, stats_size, i0, offs_t, offs_d, nq, HEAD_DIM, BLOCK_D, MASKED
        )
        block += TILE
        high_query_block = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
        high = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
        p2c_high = along_rows(tl.dot(k, high_query_block.T, input_precision=PRECISION), distance, TILE)
        bias = along_columns(two_blocks(high, low, high_pair, q, PRECISION), distance, TILE)
        bias += tl.where(high_pair, p2c_high, p2c_low)
        p2c_low = p2c_high
        low = high
        score = tl.dot(k, q.T, bias, input_precision=PRECISION)
        if partial:
            score = tl.where(valid[:, None], score, -float("inf"))
        score = without_pairs(score, masks, place, i0, j0, True, MASKED, TILE)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        p, ds = score_gradient(
            score, -lse[None, :], dp, out_dot_dout[None, :], drop, i0, j0, keep_scale, qk_scale, True, DROPOUT, TILE
        )
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        by_distance = along_rows(ds, back, TILE)
        block_ds = tl.where(below, ds_low, by_distance)
        ds_low = by_distance
        dk = tl.dot(block_ds, query_block, dk, input_precision=PRECISION)
        query_block = high_query_block
    last_ds = tl.where(below, ds_low, tl.zeros_like(ds_low))
    dk = tl.dot(last_ds, query_block, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, stats_ptr, dmean_ptr, pos_key_ptr, pos_query_ptr,
    key_mask_ptr, pair_mask_ptr, tile_list_ptr, row_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_mb: tl.int64, stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64,
    stride_pn: tl.int64, heads, nq, nk, prefix, packed, key_tiles, list_size, row_list_size, low_end, high_start,
    table_offset, table_rows, stats_size: tl.int64, threshold, has_pair, qk_scale, scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys; tiles are (keys, queries); the grid is (B * H * key_tiles,)."""
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
    stats = stats_ptr + (batch * heads + h) * query_rows + start
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
        k, v, valid, partial, queries, stats, stats_size, masks, tables, place, drop, row_list, row_list_size, tile, j0,
        row_tiles, near_start, near_stop, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE, HAS_BIAS, MASKED, DROPOUT,
        PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        if MASKED:
            near_start, near_stop = occupied(row_list, row_list_size, near_start, near_stop)
        if near_start < near_stop:
            dk, dv = _dkv_near_zone(
                k, v, dk, dv, valid, partial, queries, stats, stats_size, masks, tables, place, drop, tile, j0,
                near_start, near_stop, qk_scale, keep_scale, HEAD_DIM, BLOCK_D, TILE, MASKED, DROPOUT, PRECISION,
            )  # fmt: skip

    # Epilogue and stores.
    if MASKED:
        dmean = tl.load(dmean_ptr + batch_head * BLOCK_D + offs_d)
        dv += dmean[None, :]
    target = ((batch * key_rows + first_row) * heads + h) * HEAD_DIM
    store_rows(dk_ptr + target, offs_t, offs_d, heads * HEAD_DIM, n_mask, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + target, offs_t, offs_d, heads * HEAD_DIM, n_mask, dv, HEAD_DIM, BLOCK_D)
