"""Attend in one pass: one program per tile of queries, keys in up to four zones (prefix, far left, near, far right)."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.primitives import (
    LN2,
    along_columns,
    along_rows,
    difference,
    excluded,
    far_operands,
    kept,
    key_segments,
    load_block,
    load_rows,
    near_reach,
    sequence,
    store_rows,
    two_blocks,
)
from deberta_kernels.impl.triton.tile_list import occupied

__all__ = ["RUNTIME", "forward_kernel"]

# Values that vary from call to call: compiling again for one of them would stall a user's step.
RUNTIME = (
    "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_mb", "stride_mn", "stride_ub", "stride_um", "stride_pb", "stride_ph", "stride_pm",
    "stride_pn", "heads", "nq", "nk", "prefix", "packed", "row_tiles", "list_size", "low_end", "high_start",
    "table_offset", "table_rows", "threshold", "has_pair",
)  # fmt: skip
MASK_POINTERS = ("key_mask_ptr", "query_mask_ptr", "pair_mask_ptr", "tile_list_ptr", "cu_seqlens_ptr", "seed_ptr")


@triton.jit
def _online_softmax(
    score, row, m, total, acc, v, keep, qk_scale, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr
):
    """Fold one tile of scores into the running maximum m (log2), sum of exponentials `total` and values acc.

    A pair's full score is score * qk_scale + row, in units of log2.
    """
    new_m = tl.maximum(m, tl.max(score, 1) * qk_scale + row)
    base = new_m
    if MASKED:
        base = tl.where(new_m == -float("inf"), 0.0, new_m)  # no key so far: exp2(-inf - 0) is 0, not NaN
    p = tl.exp2(score * qk_scale - (base - row)[:, None])
    alpha = tl.exp2(m - base)
    total = total * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return new_m, total, acc


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=MASK_POINTERS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pos_key_ptr, pos_query_ptr, mean_ptr,
    key_mask_ptr, query_mask_ptr, pair_mask_ptr, tile_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_mb: tl.int64, stride_mn: tl.int64,
    stride_ub: tl.int64, stride_um: tl.int64, stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64,
    stride_pn: tl.int64, heads, nq, nk, prefix, packed, row_tiles, list_size, low_end, high_start, table_offset,
    table_rows, threshold, has_pair, qk_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
    if tile_row * TILE >= nq:
        return
    if not HAS_BIAS:
        prefix = nk  # a key without a position is a prefix key
    prefix_tiles, tiles, key_start = key_segments(nk, prefix, TILE)

    # Offsets, and what stays for the whole loop.
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    offs_i = tile_row * TILE + offs_t
    m_mask = offs_i < nq
    row_valid = m_mask
    if MASKED:
        row_valid = m_mask & (tl.load(query_mask_ptr + b * stride_ub + offs_i * stride_um, mask=m_mask, other=0) != 0)
    first_row = (start + tile_row * TILE).to(tl.int64)
    q_base = q_ptr + (batch * stride_qb + h * stride_qh + first_row * stride_qn) * UNIT
    k_base = k_ptr + (batch * stride_kb + h * stride_kh + start.to(tl.int64) * stride_kn) * UNIT
    v_base = v_ptr + (batch * stride_vb + h * stride_vh + start.to(tl.int64) * stride_vn) * UNIT
    pair_base = pair_mask_ptr + b * stride_pb + h * stride_ph + offs_i[:, None] * stride_pm
    pos_key = pos_key_ptr + h.to(tl.int64) * table_rows * BLOCK_D
    pos_query = pos_query_ptr + h.to(tl.int64) * table_rows * BLOCK_D
    tile_list = tile_list_ptr + b * list_size * 3
    q = load_rows(q_base, offs_t, offs_d, stride_qn * UNIT, row_valid, HEAD_DIM, BLOCK_D)
    m = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_D], tl.float32)
    keep = m_mask

    # Far zones: prefix keys, then the saturated keys to the left and to the right.
    near_start = tiles
    near_stop = tiles
    if HAS_BIAS:
        left, right = near_reach(prefix - key_start, low_end, high_start, TILE)
        near_start = tl.minimum(prefix_tiles + tl.maximum(tile_row + 1 - left, 0), tiles)
        near_stop = tl.minimum(prefix_tiles + tl.maximum(tile_row + right, 0), tiles)
    for zone in range(3 if HAS_BIAS else 1):
        n0 = tl.where(zone == 0, 0, tl.where(zone == 1, prefix_tiles, near_stop))
        n1 = tl.where(zone == 0, prefix_tiles, tl.where(zone == 1, near_start, tiles))
        origin = tl.where(zone == 0, 0, key_start - prefix_tiles * TILE)
        first_key = tl.where(zone == 0, 0, prefix)
        last_key = tl.where(zone == 0, prefix, nk)
        if MASKED:
            n0 = tl.load(tile_list + n0)
            n1 = tl.load(tile_list + n1)
        if n0 < n1:
            far_q = q
            row = tl.zeros([TILE], tl.float32)
            if HAS_BIAS:
                far_q, row = far_operands(
                    q, pos_key, pos_query, tl.where(zone == 1, table_rows - 1, 0), offs_d, zone, BLOCK_D
                )
                row = row * qk_scale
            for n in range(n0, n1):
                tile = n
                if MASKED:
                    tile = tl.load(tile_list + list_size + n)
                j0 = origin + tile * TILE
                offs_j = j0 + offs_t
                valid = (offs_j >= first_key) & (offs_j < last_key)
                partial = (j0 < first_key) | (j0 + TILE > last_key)
                if MASKED:
                    valid = valid & (
                        tl.load(key_mask_ptr + b * stride_mb + offs_j * stride_mn, mask=valid, other=0) != 0
                    )
                    partial = tl.load(tile_list + 2 * list_size + tile) < TILE
                k_tile = k_base + j0.to(tl.int64) * stride_kn * UNIT
                v_tile = v_base + j0.to(tl.int64) * stride_vn * UNIT
                k = load_rows(k_tile, offs_t, offs_d, stride_kn * UNIT, valid, HEAD_DIM, BLOCK_D)
                v = load_rows(v_tile, offs_t, offs_d, stride_vn * UNIT, valid, HEAD_DIM, BLOCK_D)
                score = tl.dot(far_q, k.T, input_precision=PRECISION)
                score = excluded(
                    score, valid[None, :], partial, pair_base + offs_j[None, :] * stride_pn,
                    m_mask[:, None] & valid[None, :], has_pair, MASKED,
                )  # fmt: skip
                if DROPOUT:
                    keep = kept(seed_ptr, batch_head, tile_row * TILE, j0, threshold, TILE)
                m, total, acc = _online_softmax(
                    score, row, m, total, acc, v, keep, qk_scale, MASKED, DROPOUT, PRECISION
                )

    # Near zone: linear and logarithmic distances, and the tiles where they meet the saturated ones.
    if HAS_BIAS:
        if MASKED:
            near_start, near_stop = occupied(tile_list, list_size, near_start, near_stop)
        if near_start < near_stop:
            distance = difference(TILE)
            high_row = offs_t[:, None] >= offs_t[None, :]
            upper = offs_t[:, None] + offs_t[None, :] < TILE
            no_row = tl.zeros([TILE], tl.float32)
            block = (tile_row - near_start + prefix_tiles) * TILE + prefix - key_start + table_offset
            c2p_high = along_rows(
                tl.dot(q, load_block(pos_key, block, offs_t, offs_d, BLOCK_D).T, input_precision=PRECISION),
                distance, TILE,
            )  # fmt: skip
            high = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
            for tile in tl.range(near_start, near_stop, num_stages=1):
                j0 = key_start + (tile - prefix_tiles) * TILE
                offs_j = j0 + offs_t
                valid = (offs_j >= prefix) & (offs_j < nk)
                partial = (j0 < prefix) | (j0 + TILE > nk)
                if MASKED:
                    valid = valid & (
                        tl.load(key_mask_ptr + b * stride_mb + offs_j * stride_mn, mask=valid, other=0) != 0
                    )
                    partial = tl.load(tile_list + 2 * list_size + tile) < TILE
                k_tile = k_base + j0.to(tl.int64) * stride_kn * UNIT
                v_tile = v_base + j0.to(tl.int64) * stride_vn * UNIT
                k = load_rows(k_tile, offs_t, offs_d, stride_kn * UNIT, valid, HEAD_DIM, BLOCK_D)
                v = load_rows(v_tile, offs_t, offs_d, stride_vn * UNIT, valid, HEAD_DIM, BLOCK_D)
                block -= TILE
                low = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
                c2p_low = along_rows(
                    tl.dot(q, load_block(pos_key, block, offs_t, offs_d, BLOCK_D).T, input_precision=PRECISION),
                    distance, TILE,
                )  # fmt: skip
                bias = along_columns(two_blocks(high, low, upper, k, PRECISION), distance, TILE)
                bias += tl.where(high_row, c2p_high, c2p_low)
                c2p_high = c2p_low
                high = low
                score = tl.dot(q, k.T, bias, input_precision=PRECISION)
                score = excluded(
                    score, valid[None, :], partial, pair_base + offs_j[None, :] * stride_pn,
                    m_mask[:, None] & valid[None, :], has_pair, MASKED,
                )  # fmt: skip
                if DROPOUT:
                    keep = kept(seed_ptr, batch_head, tile_row * TILE, j0, threshold, TILE)
                m, total, acc = _online_softmax(
                    score, no_row, m, total, acc, v, keep, qk_scale, MASKED, DROPOUT, PRECISION
                )

    # Epilogue and stores.
    if MASKED:
        padded = (total == 0.0) | (row_valid == 0)
        mean = tl.load(mean_ptr + batch_head.to(tl.int64) * HEAD_DIM + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
        out = acc * (keep_scale / tl.where(padded, 1.0, total))[:, None]
        out = tl.where(padded[:, None], mean[None, :], out)
        lse = tl.where(padded, -float("inf"), (m + tl.log2(total)) * LN2)
    else:
        out = acc * (keep_scale / total)[:, None]
        lse = (m + tl.log2(total)) * LN2
    out_base = out_ptr + ((batch * memory_rows + first_row) * heads + h) * HEAD_DIM
    store_rows(out_base, offs_t, offs_d, heads * HEAD_DIM, m_mask, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (batch * heads + h) * memory_rows + first_row + offs_t, lse, mask=m_mask)
