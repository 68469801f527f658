"""The two kernels between position tables and expanded tables; `tables` says what these are."""

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import when

__all__ = ["_disentangled_expand_kernel", "_disentangled_fold_kernel"]


@triton.jit(
    do_not_specialize=("stride_kh", "stride_kn", "stride_qh", "stride_qn", "rows", "skipped", "first_row", "table_rows",
                       "has_key", "has_query"),
    do_not_specialize_on_alignment=("pos_key_ptr", "pos_query_ptr", "delta_ptr"),
)  # fmt: skip
def _disentangled_expand_kernel(
    pos_key_ptr, pos_query_ptr, expanded_ptr, delta_ptr, stride_kh: tl.int64, stride_kn: tl.int64, stride_qh: tl.int64,
    stride_qn: tl.int64, rows, skipped, first_row, table_rows, has_key, has_query,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write (2, H, rows, BLOCK_D): both tables by distance; a missing table is zero. The grid is (tiles, H, 2).

    Row i holds the distance that entry `skipped + i` of delta stands for. Distances that the tables given do not hold
    (they hold rows first_row ... first_row + table_rows - 1) get their nearest row, and are never used.
    """
    h = tl.program_id(1)
    which = tl.program_id(2)
    offs_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_n < rows
    row = tl.load(delta_ptr + skipped + offs_n, mask=mask, other=0) - first_row
    row = tl.minimum(tl.maximum(row, 0), table_rows - 1)
    inside = mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    target = expanded_ptr + ((which * tl.num_programs(1) + h) * rows.to(tl.int64) + offs_n[:, None]) * BLOCK_D
    if which == 0:
        source = pos_key_ptr + h * stride_kh + row[:, None] * stride_kn + offs_d[None, :]
        value = tl.load(source, mask=when(inside, has_key), other=0.0)
    else:
        source = pos_query_ptr + h * stride_qh + row[:, None] * stride_qn + offs_d[None, :]
        value = tl.load(source, mask=when(inside, has_query), other=0.0)
    tl.store(target + offs_d[None, :], value, mask=mask[:, None])


@triton.jit(
    do_not_specialize=("rows", "skipped", "first_row", "table_rows", "parts", "heads", "low_row", "high_row",
                       "has_key", "has_query"),
    do_not_specialize_on_alignment=("order_ptr", "bounds_ptr"),
)  # fmt: skip
def _disentangled_fold_kernel(
    near_ptr, far_ptr, dpos_key_ptr, dpos_query_ptr, order_ptr, bounds_ptr, rows, skipped, first_row, table_rows, parts,
    heads, low_row, high_row, has_key, has_query, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the distances that share a row; the grid is (tiles of ROWS table rows, H, 2 tables).

    Args:
        near_ptr: (2 tables, parts, H, rows, BLOCK_D) float32, parts summed in this order.
        far_ptr: (2 tables, 2, H, BLOCK_D) float32, sums over the saturated pairs of the smallest and of the largest
            distances.
        dpos_key_ptr: (H, table_rows, HEAD_DIM), written where has_key.
        dpos_query_ptr: the same of the other table.
        order_ptr: see `DeviceTables`.
        bounds_ptr: see `DeviceTables`.
        low_row: row of the full table that the smallest distances share.
        high_row: row that the largest distances share.
    """
    h = tl.program_id(1)
    which = tl.program_id(2)
    if tl.where(which == 0, has_key, has_query) == 0:
        return
    near_ptr += which * (parts * heads * rows).to(tl.int64) * BLOCK_D
    far_ptr += which * 2 * heads * BLOCK_D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, CHUNK)
    offs_d = tl.arange(0, BLOCK_D)
    exists = row < table_rows
    first = tl.load(bounds_ptr + row + first_row, mask=exists, other=0)
    count = tl.load(bounds_ptr + row + first_row + 1, mask=exists, other=0) - first
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for chunk in range(0, tl.max(count, 0), CHUNK):
        entry = chunk + offs_c[None, :]
        listed = entry < count[:, None]
        x = tl.load(order_ptr + first[:, None] + entry, mask=listed, other=0) - skipped
        inside = listed & (x >= 0) & (x < rows)
        if tl.max(tl.max(inside.to(tl.int32), 1), 0) != 0:
            for part in range(0, parts):
                source = near_ptr + ((part * heads + h).to(tl.int64) * rows + x) * BLOCK_D
                values = tl.load(source[:, :, None] + offs_d[None, None, :], mask=inside[:, :, None], other=0.0)
                acc += tl.sum(values, 1)
    low = exists & (row + first_row == low_row)
    high = exists & (row + first_row == high_row)
    far = far_ptr + h * BLOCK_D + offs_d[None, :] + tl.zeros([ROWS, BLOCK_D], tl.int32)
    acc += tl.load(far, mask=low[:, None] & (offs_d < BLOCK_D)[None, :], other=0.0)
    acc += tl.load(far + heads * BLOCK_D, mask=high[:, None] & (offs_d < BLOCK_D)[None, :], other=0.0)
    target = (h * table_rows + row).to(tl.int64)[:, None] * HEAD_DIM + offs_d[None, :]
    gradient = (acc * scale).to(dpos_key_ptr.dtype.element_ty)
    inside = exists[:, None] & (offs_d < HEAD_DIM)[None, :]
    if which == 0:
        tl.store(dpos_key_ptr + target, gradient, mask=inside)
    else:
        tl.store(dpos_query_ptr + target, gradient, mask=inside)
