"""What the passes of the backward need of each query."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import (
    LOG2E_HIGH,
    LOG2E_LOW,
    POINTERS,
    RUNTIME,
    load_rows,
    load_table_row,
    sequence,
    store_pairs,
    sum_of_products,
    when,
)
from deberta_kernels.impl.triton.kernels.scores import far_constant

__all__ = ["_disentangled_bwd_preprocess_kernel", "_disentangled_sum_kernel"]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def _disentangled_bwd_preprocess_kernel(
    q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, pos_key_ptr, stats_ptr, dmean_ptr, cu_seqlens_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn, stride_ob: tl.int64, stride_oh: tl.int64, stride_on,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_ln: tl.int64, heads, nq, nk, packed, row_tiles, table_rows,
    stats_size: tl.int64, has_dlse, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write what the other kernels need of each query; the grid is (B * H * row_tiles,).

    stats: float32: (3, B, H, Nq, 2), a pair of each query for near keys, for those of the smallest distances and for
    those of the largest: the row constant of a raw score less its log-sum-exp, -inf on padded rows; sum of out * dout
    less dlse. Pairs, since one load of two numbers is copied as one. Then (B, H, Nq): dlse, or in float32 what the pass
    by queries writes.
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
    dlse_rows = batch * stride_lb + h * stride_lh + (first_row + offs_t) * stride_ln
    dlse = tl.load(dlse_ptr + dlse_rows, mask=when(m_mask, has_dlse), other=0.0)
    out_dot_dout = sum_of_products(out, dout, 1) - dlse
    # Rounded once: the weights are as exact as what is subtracted here, and a large score makes that coarse.
    wide = lse.to(tl.float64)
    raw = ((wide * LOG2E_HIGH + wide * LOG2E_LOW) / qk_scale).to(tl.float32)
    shift = tl.where(padded, -float("inf"), -raw)
    out_dot_dout = tl.where(padded, 0.0, out_dot_dout)
    store_pairs(stats_ptr, 0, stats_size, stats, shift, out_dot_dout, m_mask)
    tl.store(stats_ptr + 6 * stats_size + stats, tl.where(padded, 0.0, dlse), mask=m_mask)
    if HAS_BIAS:
        q_base = q_ptr + (batch * stride_qb + h * stride_qh + first_row * stride_qn) * UNIT
        q = load_rows(q_base, offs_t, offs_d, stride_qn * UNIT, m_mask & (padded == 0), HEAD_DIM, BLOCK_D)
        pos_key = pos_key_ptr + h.to(tl.int64) * table_rows * BLOCK_D
        for side in tl.static_range(2):
            row = load_table_row(pos_key, side * (table_rows - 1), offs_d, table_rows, BLOCK_D)
            constant = far_constant(q, row)
            store_pairs(stats_ptr, 1 + side, stats_size, stats, constant + shift, out_dot_dout, m_mask)
    if MASKED:
        dmean = tl.sum(tl.where((padded & m_mask)[:, None], dout, 0.0), 0) / nk
        tl.store(dmean_ptr + pid.to(tl.int64) * BLOCK_D + offs_d, dmean)


@triton.jit(do_not_specialize=("n",))
def _disentangled_sum_kernel(parts_ptr, sum_ptr, n, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Sum (groups, n, BLOCK_D) float32 over n, always in the same order; the grid is (groups,)."""
    offs_n = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    base = parts_ptr + tl.program_id(0).to(tl.int64) * n * BLOCK_D
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, n, ROWS):
        offs = (first + offs_n)[:, None].to(tl.int64) * BLOCK_D + offs_d[None, :]
        acc += tl.load(base + offs, mask=(first + offs_n < n)[:, None], other=0.0)
    tl.store(sum_ptr + tl.program_id(0) * BLOCK_D + offs_d, tl.sum(acc, 0))
