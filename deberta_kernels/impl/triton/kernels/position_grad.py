"""Gradients of the position tables: one program per diagonal of tiles, which owns its rows and needs no atomics.

All tiles of a diagonal read the same two blocks of the expanded tables, so their gradients are two sums that stay in
registers. The scores are recomputed a third time; in exchange the sums have one fixed order, and the same call gives
the same bits: what `torch.use_deterministic_algorithms` asks for. Otherwise the passes by queries and by keys add these
gradients, in any order. Saturated tiles are not here: the pass by queries sums their gradients on its way.
"""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import (
    POINTERS,
    PREFIX_STEP,
    RUNTIME,
    along_columns,
    along_rows,
    difference,
    key_segments,
    layout_of_rows,
    load_block,
    load_pairs,
    load_tokens,
    sequence,
    slanted,
    total,
)
from deberta_kernels.impl.triton.kernels.scores import allowed, near_score, score_gradient, valid_keys, weights
from deberta_kernels.impl.triton.kernels.tile_list import ALL, ROWS, kind_range

__all__ = ["_disentangled_bwd_position_kernel"]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def _disentangled_bwd_position_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, near_ptr, pos_key_ptr, pos_query_ptr,
    key_mask_ptr, pair_mask_ptr, tile_list_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_kb: tl.int64, stride_kh: tl.int64, stride_kn,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_mb: tl.int64, stride_pb: tl.int64, stride_ph: tl.int64, stride_pm: tl.int64,
    stride_pn: tl.int64, heads, nq, nk, prefix, packed, samples, first_diagonal, row_tiles, parts, list_size, low_end,
    high_start, table_offset, table_rows, stats_size: tl.int64, threshold, has_pair, qk_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the rows of one diagonal of near tiles; the grid is (diagonals, H, parts).

    near: (2 tables, parts, 2 halves, H, table_rows, BLOCK_D) float32, zero where nothing is written. Half 0 holds the
    pairs r >= c of tiles, half 1 the others, of which the diagonal next to it writes the same rows.
    """
    diagonal = first_diagonal + tl.program_id(0)
    h = tl.program_id(1)
    part = tl.program_id(2)
    memory_rows = nq
    padded_nk = nk
    offs_t = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    block = diagonal * TILE + prefix % PREFIX_STEP + table_offset
    pos_key = pos_key_ptr + h.to(tl.int64) * table_rows * BLOCK_D
    pos_query = pos_query_ptr + h.to(tl.int64) * table_rows * BLOCK_D
    high_key = load_block(pos_key, block, offs_t, offs_d, BLOCK_D)
    low_key = load_block(pos_key, block - TILE, offs_t, offs_d, BLOCK_D)
    high_query = load_block(pos_query, block, offs_t, offs_d, BLOCK_D)
    low_query = load_block(pos_query, block - TILE, offs_t, offs_d, BLOCK_D)
    zero = layout_of_rows(tl.dot(high_query, high_key.T, input_precision=PRECISION), part)
    index = slanted(TILE, 0, zero)
    distance = difference(TILE) + zero[:, None]
    around = total(TILE) + zero[:, None]
    high_row = offs_t[:, None] >= offs_t[None, :]
    upper = offs_t[:, None] + offs_t[None, :] < TILE
    dkey_high = tl.zeros([TILE, BLOCK_D], tl.float32)
    dkey_low = tl.zeros([TILE, BLOCK_D], tl.float32)
    dquery_high = tl.zeros([TILE, BLOCK_D], tl.float32)
    dquery_low = tl.zeros([TILE, BLOCK_D], tl.float32)
    # A part takes every parts-th tile of the diagonals of all samples, one after the other.
    for n in tl.range(part, samples * row_tiles, parts, num_stages=1):
        b = n // row_tiles
        tile_row = n % row_tiles
        batch = tl.where(packed != 0, 0, b).to(tl.int64)
        start, nq_b, nk_b = sequence(cu_seqlens_ptr, packed, b, memory_rows, padded_nk)
        prefix_tiles, tiles, key_start = key_segments(nk_b, prefix, TILE)
        position_tile = tile_row - diagonal
        tile = position_tile + prefix_tiles
        inside = (tile_row * TILE < nq_b) & (position_tile >= 0) & (tile < tiles)
        if MASKED:
            tile_list = tile_list_ptr + b.to(tl.int64) * list_size * ROWS
            first_tile = tl.where(inside, tile, 0)
            n0, n1 = kind_range(tile_list, list_size, first_tile, first_tile + 1, ALL)
            inside = inside & (n0 < n1)
        if inside:
            i0 = tile_row * TILE
            j0 = key_start + position_tile * TILE
            m_mask = i0 + offs_t < nq_b
            valid = valid_keys(j0 + offs_t, prefix, nk_b, key_mask_ptr + b * stride_mb, MASKED)
            row = (batch * heads + h) * memory_rows + start + i0 + offs_t
            shift, out_dot_dout = load_pairs(stats_ptr, 0, stats_size, row, m_mask)
            row_valid = shift != -float("inf")
            head = h.to(tl.int64)
            q_base = q_ptr + (batch * stride_qb + head * stride_qh) * UNIT
            dout_base = dout_ptr + (batch * stride_ob + head * stride_oh) * UNIT
            k_base = k_ptr + (batch * stride_kb + head * stride_kh) * UNIT
            v_base = v_ptr + (batch * stride_vb + head * stride_vh) * UNIT
            queries = (q_base, dout_base, stride_qn * UNIT, stride_on * UNIT)
            keys = (k_base, v_base, stride_kn * UNIT, stride_vn * UNIT)
            q, dout = load_tokens(queries, start + i0, offs_t, offs_d, row_valid, HEAD_DIM, BLOCK_D)
            k, v = load_tokens(keys, start + j0, offs_t, offs_d, valid, HEAD_DIM, BLOCK_D)
            score = near_score(q, k, low_key, high_key, low_query, high_query, index, TILE, PRECISION)
            pair_mask = pair_mask_ptr + b * stride_pb + h * stride_ph
            masks = (key_mask_ptr, tile_list_ptr, list_size, pair_mask, has_pair, stride_pm, stride_pn)
            place = (nq_b, nk_b, prefix, prefix_tiles, tiles, key_start)
            score = allowed(score, valid, True, masks, place, i0, j0, False, MASKED, TILE)
            drop = (seed_ptr, b * heads + h, threshold)
            p = weights(score, shift[:, None], qk_scale, q)
            dp = tl.dot(dout, v.T, input_precision=PRECISION)
            _, ds = score_gradient(p, dp, out_dot_dout[:, None], drop, i0, j0, keep_scale, False, DROPOUT, TILE)
            ds = ds.to(q.dtype)
            nothing = tl.zeros_like(ds)
            by_query = along_rows(ds, distance, TILE)  # (r, y)
            by_key = along_columns(ds, around, TILE)  # (y, c)
            dkey_high = tl.dot(tl.where(high_row, by_query, nothing).T, q, dkey_high, input_precision=PRECISION)
            dkey_low = tl.dot(tl.where(high_row, nothing, by_query).T, q, dkey_low, input_precision=PRECISION)
            dquery_high = tl.dot(tl.where(upper, by_key, nothing), k, dquery_high, input_precision=PRECISION)
            dquery_low = tl.dot(tl.where(upper, nothing, by_key), k, dquery_low, input_precision=PRECISION)
    half = heads.to(tl.int64) * table_rows * BLOCK_D
    inner = (h.to(tl.int64) * table_rows + block + offs_t[:, None]) * BLOCK_D + offs_d[None, :]
    high_target = near_ptr + part * 2 * half + inner
    low_target = high_target + half - TILE * BLOCK_D
    tl.store(high_target, dkey_high)
    tl.store(low_target, dkey_low)
    tl.store(high_target + parts * 2 * half, dquery_high)
    tl.store(low_target + parts * 2 * half, dquery_low)
