"""Run attention in the native CPU library: hand it tensors. The kernels are in csrc/cpu."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deberta_kernels import dropout, native
from deberta_kernels.checks.arguments import check_storage
from deberta_kernels.native import AttentionParams, Library
from deberta_kernels.position import PositionIndex, position_index, reachable_rows
from deberta_kernels.types import AttentionProblem, Gradients, Masks, PositionSpec

__all__ = ["backward", "forward", "prepare", "refusal"]

_MAX_HEAD_DIM = 256
_NO_SIZE = -1  # of prepared tables that are not one row of bytes


def refusal(problem: AttentionProblem) -> str | None:
    """Return why the native library cannot run `problem`, or None when it can."""
    q = problem.q
    if q.device.type != "cpu":
        return f"it runs on cpu tensors, not {q.device.type}"
    if q.dtype not in native.DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is more than {_MAX_HEAD_DIM}"
    return native.unavailable()


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `AttentionProblem`.

    Returns:
        out: (B, H, Nq, D) view of memory laid out (B, Nq, H, D), dtype of q.
        lse: (B, H, Nq) float32, natural log.
    """
    library = native.need()
    q, prepared = problem.q, problem.prepared
    batch, heads, nq, _ = q.shape
    out, lse = _empty_tokens(q), torch.empty((batch, heads, nq), dtype=torch.float32, device="cpu")
    if not q.numel():
        return out, lse
    call = _Call(problem, library, _reachable(problem) if prepared is None else _whole(problem), prepared)
    p = call.params
    p.out, (p.out_stride_b, p.out_stride_h, p.out_stride_n, _) = call.values(out)
    p.lse, (p.lse_stride_b, p.lse_stride_h, _) = call.values(lse)
    try:
        library.call("dk_cpu_forward", p)
    except ValueError:
        if prepared is None:
            raise
        raise _wrong_prepared(prepared, library, p) from None
    return out, lse


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Gradients:  # fmt: skip
    """Compute the gradients asked for.

    Args:
        problem: what forward got.
        dout: (B, H, Nq, D) dtype of q, any strides.
        dlse: (B, H, Nq) float32 or None.
        out: what forward returned.
        lse: what forward returned.
        needs: whether dq, dk, dv, dpos_key, dpos_query are wanted.
    """
    library = native.need()
    q, k, v = problem.q, problem.k, problem.v
    if not q.numel():
        tensors = (q, k, v, problem.pos_key, problem.pos_query)
        return Gradients(*(torch.zeros_like(x) if n and x is not None else None for n, x in zip(needs, tensors)))
    tables = _reachable(problem)
    call = _Call(problem, library, tables)
    p = call.params
    p.out, (p.out_stride_b, p.out_stride_h, p.out_stride_n, _) = call.values(out)
    p.dout, (p.dout_stride_b, p.dout_stride_h, p.dout_stride_n, _) = call.values(dout)
    # The kernel takes both as rows of one layout, without gaps.
    lse, dlse = lse.resolve_neg().contiguous(), None if dlse is None else dlse.resolve_neg().contiguous()
    p.lse, (p.lse_stride_b, p.lse_stride_h, _) = call.values(lse)
    if dlse is not None:
        p.dlse = call.address(dlse)
    dq, dk, dv = (_empty_tokens(x) if need else None for need, x in zip(needs, (q, k, v)))
    if dq is not None:
        p.dq, (p.dq_stride_b, p.dq_stride_h, p.dq_stride_n, _) = call.values(dq)
    if dk is not None:
        p.dk, (p.dk_stride_b, p.dk_stride_h, p.dk_stride_n, _) = call.values(dk)
    if dv is not None:
        p.dv, (p.dv_stride_b, p.dv_stride_h, p.dv_stride_n, _) = call.values(dv)
    dpos_key, p.dpos_key = _table_gradient(needs[3], problem, problem.pos_key, tables)
    dpos_query, p.dpos_query = _table_gradient(needs[4], problem, problem.pos_query, tables)
    gradients = [x for x in (dpos_key, dpos_query) if x is not None]
    p.dpos_stride_h = gradients[0].stride(0) if gradients else 0
    library.call("dk_cpu_backward", p)
    return Gradients(dq, dk, dv, *(None if g is None else g.to(q.dtype) for g in (dpos_key, dpos_query)))


def prepare(pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec) -> Tensor | None:
    """Pack the tables as the kernel reads them, for reuse while they do not change.

    Args:
        pos_key: (H, rows, D) or None.
        pos_query: (H, rows, D) or None.
        position: see `PositionSpec`.

    Returns:
        (bytes,) uint8, valid for this instruction set only; None when there is nothing to pack.
    """
    table = pos_key if pos_key is not None else pos_query
    if (
        table is None
        or table.dtype not in native.DTYPES
        or table.device.type != "cpu"
        or table.shape[-1] > _MAX_HEAD_DIM
    ):
        return None
    library = native.opened()
    if library is None:
        return None
    for name, x in (("pos_key", pos_key), ("pos_query", pos_query)):
        if x is not None:
            check_storage(name, x)
    tokens = table.new_empty(1, table.shape[0], 0, table.shape[2])
    problem = AttentionProblem(tokens, tokens, tokens, pos_key, pos_query, Masks(), position, 1.0)
    call = _Call(problem, library, _whole(problem))
    packed = torch.empty(library.prepared_bytes(call.params), dtype=torch.uint8, device="cpu")
    library.call("dk_cpu_prepare", call.params, packed.data_ptr())
    return packed


def _empty_tokens(like: Tensor) -> Tensor:
    """Return (B, H, N, D) over memory laid out (B, N, H, D): on the CPU, whatever torch's defaults are.

    Made so and not by `transpose`, since a view takes longer to make, and autograd remembers where it was made.
    """
    _, heads, length, head_dim = like.shape
    strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device="cpu")


def _wrong_prepared(prepared: Tensor, library: Library, params: AttentionParams) -> ValueError:
    return ValueError(
        f"prepared must be what prepare returned for these tables, uint8 of {library.prepared_bytes(params)} bytes, "
        f"got {prepared.dtype} of shape {tuple(prepared.shape)} and strides {prepared.stride()}; prepare the tables "
        "again."
    )


class _Tables(NamedTuple):
    """The position tables that a kernel reads: some of those given, or all of them.

    Attributes:
        key: (H, rows, D) or None.
        query: (H, rows, D) or None.
        rows: 0 without tables.
        first_row: row of the full table that row 0 is.
    """

    key: Tensor | None
    query: Tensor | None
    rows: int
    first_row: int


def _whole(problem: AttentionProblem) -> _Tables:
    pos_key, pos_query = problem.pos_key, problem.pos_query
    table = pos_key if pos_key is not None else pos_query
    return _Tables(pos_key, pos_query, 0 if table is None else table.shape[1], problem.position.first_row)


def _reachable(problem: AttentionProblem) -> _Tables:
    """Cut the tables to the rows that this length can reach; packing the others would be wasted."""
    tables, position = _whole(problem), problem.position
    if not tables.rows:
        return tables
    if problem.cu_seqlens is None:
        nq, nk = problem.q.shape[2], problem.k.shape[2] - position.prefix_length
    else:
        nq = nk = problem.max_seqlen
    start, stop = reachable_rows(nq, nk, position)
    if stop - start >= tables.rows:
        return tables
    used = slice(start - position.first_row, stop - position.first_row)
    key, query = (None if x is None else x[:, used] for x in tables[:2])
    return _Tables(key, query, stop - start, start)


def _table_gradient(
    needed: bool, problem: AttentionProblem, table: Tensor | None, used: _Tables
) -> tuple[Tensor | None, int]:
    """Make the gradient of a whole table, and return where the rows in use begin, which the kernel fills."""
    if not needed or table is None:
        return None, 0
    gradient = torch.empty(table.shape, dtype=torch.float32, device="cpu")
    start = used.first_row - problem.position.first_row
    for unreached in (gradient[:, :start], gradient[:, start + used.rows :]):
        unreached.zero_()
    return gradient, gradient[:, start:].data_ptr()


class _Call:
    """The arguments of one native call, and the tensors that live as long as it does."""

    def __init__(
        self, problem: AttentionProblem, library: Library, tables: _Tables, prepared: Tensor | None = None
    ) -> None:
        q, k, v, masks, position = problem.q, problem.k, problem.v, problem.masks, problem.position
        self.alive: list[object] = []  # copies and cached tensors whose addresses are held; the problem keeps the rest
        self.params = p = AttentionParams()
        p.abi_version, p.dtype, p.threads = native.ABI_VERSION, native.DTYPES[q.dtype], library.threads()
        p.batch, p.heads, p.nq, p.head_dim = q.shape
        p.nk = k.shape[2]
        if problem.cu_seqlens is not None:
            p.batch, p.nq, p.nk = problem.cu_seqlens.numel() - 1, problem.max_seqlen, problem.max_seqlen
            p.cu_seqlens = self.address(problem.cu_seqlens.contiguous())
        p.q, (p.q_stride_b, p.q_stride_h, p.q_stride_n, _) = self.values(q)
        p.k, (p.k_stride_b, p.k_stride_h, p.k_stride_n, _) = self.values(k)
        p.v, (p.v_stride_b, p.v_stride_h, p.v_stride_n, _) = self.values(v)
        p.first_row, p.prefix_length, p.scale = tables.first_row, position.prefix_length, problem.scale
        p.smooth = 1
        if tables.rows or prepared is not None:
            self._add_tables(tables, prepared, position_index(max(p.nq, p.nk), position))
        if masks.key is not None:
            p.key_mask, (p.key_mask_stride_b, _) = self.values(masks.key)
        if masks.query is not None:
            p.query_mask, (p.query_mask_stride_b, _) = self.values(masks.query)
        if masks.pair is not None:
            p.pair_mask, (p.pair_mask_stride_b, head, p.pair_mask_stride_q, _) = self.values(masks.pair)
            p.pair_mask_stride_h = head if masks.pair.shape[1] > 1 else 0
        p.dropout_scale = 1.0
        if problem.dropout_p > 0 and problem.seed is not None:
            p.dropout_threshold = dropout.threshold(problem.dropout_p)
            p.dropout_scale, p.seed = dropout.keep_scale(problem.dropout_p), int(problem.seed)

    def _add_tables(self, tables: _Tables, prepared: Tensor | None, index: PositionIndex) -> None:
        p = self.params
        if tables.key is not None:
            p.pos_key, (p.pos_key_stride_h, p.pos_key_stride_r, _) = self.values(tables.key)
            p.has_pos_key = 1
        if tables.query is not None:
            p.pos_query, (p.pos_query_stride_h, p.pos_query_stride_r, _) = self.values(tables.query)
            p.has_pos_query = 1
        p.table_rows = tables.rows
        if prepared is not None:
            whole = prepared.dtype is torch.uint8 and prepared.dim() == 1 and prepared.is_contiguous()
            p.prepared, p.prepared_bytes = self.address(prepared), prepared.numel() if whole else _NO_SIZE
        p.delta, p.reach = self.address(index.delta), index.reach
        p.low_end, p.high_start, p.smooth = index.low_end, index.high_start, index.smooth
        self.alive.append(index)

    def values(self, x: Tensor) -> tuple[int, tuple[int, ...]]:
        """Return the address and strides of x with a contiguous last dimension and no pending negation."""
        strides = x.stride()
        if strides[-1] != 1 or x.is_neg():
            x = x.resolve_neg().contiguous()
            self.alive.append(x)
            strides = x.stride()
        return self.address(x), strides

    def address(self, x: Tensor) -> int:
        """Return where x is."""
        address = x.data_ptr()
        if not address and x.numel():
            raise ValueError(f"a tensor of shape {tuple(x.shape)} must have memory, got none; pass a copy of it.")
        return address
