"""A plain flash attention forward without positions: what the loop over saturated tiles is compared with."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["plain_flash_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def plain_flash_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale,
    heads,
    queries,
    keys,
    stride_b,
    stride_h,
    stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend over whole key tiles only: the shortest loop an online softmax can have."""
    batch = tl.program_id(1) // heads
    base = batch.to(tl.int64) * stride_b + (tl.program_id(1) % heads).to(tl.int64) * stride_h
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    m_mask = offs_m < queries
    rows = base + offs_m[:, None] * stride_n + offs_d[None, :]
    q = tl.load(q_ptr + rows, mask=m_mask[:, None], other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    factor = scale * LOG2_E
    for start in range(0, keys, BLOCK_N):
        columns = base + (start + offs_n)[:, None] * stride_n + offs_d[None, :]
        k = tl.load(k_ptr + columns)
        v = tl.load(v_ptr + columns)
        scores = tl.dot(q, k.T)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
        probabilities = tl.exp2(scores * factor - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(probabilities, 1)
        accumulator = tl.dot(probabilities.to(v.dtype), v, accumulator * shrink[:, None])
        row_max = new_max
    accumulator = accumulator / row_sum[:, None]
    tl.store(out_ptr + rows, accumulator.to(out_ptr.dtype.element_ty), mask=m_mask[:, None])
    tl.store(lse_ptr + tl.program_id(1) * queries + offs_m, row_max + tl.log2(row_sum), mask=m_mask)
