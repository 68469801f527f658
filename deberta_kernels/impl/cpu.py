"""Attention in the native CPU library: how tensors get there. The kernels are in csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from deberta_kernels import dropout, native
from deberta_kernels.checks.arguments import check_storage, storage_fits
from deberta_kernels.checks.operands import check_reachable_rows, check_storages
from deberta_kernels.dtypes import KERNEL_FLOATS
from deberta_kernels.impl.common import (
    Needs,
    device_refusal,
    dtype_refusal,
    empty_tokens,
    head_dim_refusal,
    zero_gradients,
)
from deberta_kernels.native import AttentionParams, Library
from deberta_kernels.position import call_index
from deberta_kernels.types import AttentionProblem, Gradients, Masks, PositionSpec

__all__ = ["backward", "forward", "prepare", "refusal"]

_MAX_HEAD_DIM = 256
_CPU = torch.device("cpu")  # the name would be parsed at every call
_NO_SIZE = -1  # of prepared tables that are not one row of bytes


def refusal(problem: AttentionProblem) -> str | None:
    """Return why the native library cannot run `problem`, or None when it can."""
    q = problem.q
    if q.is_cpu and q.dtype in KERNEL_FLOATS and q.shape[-1] <= _MAX_HEAD_DIM:
        return native.unavailable()
    return (
        device_refusal(q.device, "cpu")
        or dtype_refusal(q.dtype, KERNEL_FLOATS)
        or head_dim_refusal(q.shape[-1], _MAX_HEAD_DIM)
    )


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `AttentionProblem`.

    Returns:
        out: (B, H, Nq, D) over memory laid out (B, Nq, H, D), dtype of q.
        lse: (B, H, Nq) float32, natural log.
    """
    library = native.need()
    q, prepared = problem.q, problem.prepared
    batch, heads, nq, head_dim = q.shape
    out = empty_tokens(q)
    lse = torch.empty_strided((batch, heads, nq), (heads * nq, nq, 1), dtype=torch.float32, device=_CPU)
    if not q.numel():
        return out, lse
    call = _Call(problem, library, prepared)
    p = call.params
    p.out, p.out_stride_b, p.out_stride_h, p.out_stride_n = (
        out.data_ptr(), nq * heads * head_dim, head_dim, heads * head_dim,
    )  # fmt: skip
    p.lse, p.lse_stride_b, p.lse_stride_h = lse.data_ptr(), heads * nq, nq
    try:
        library.call("dk_cpu_forward", p)
    except ValueError:
        if prepared is None:
            raise
        raise _wrong_prepared(prepared, library, p) from None
    return out, lse


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
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
        return zero_gradients(problem, needs)
    call = _Call(problem, library)
    p = call.params
    p.out, p.out_stride_b, p.out_stride_h, p.out_stride_n = call.tokens(out)
    p.dout, p.dout_stride_b, p.dout_stride_h, p.dout_stride_n = call.tokens(dout)
    # The kernel takes both as rows of one layout, without gaps.
    lse, dlse = lse.resolve_neg().contiguous(), None if dlse is None else dlse.resolve_neg().contiguous()
    p.lse, (p.lse_stride_b, p.lse_stride_h, _) = call.values(lse)
    if dlse is not None:
        p.dlse = call.address(dlse)
    dq, dk, dv = (empty_tokens(x) if need else None for need, x in zip(needs, (q, k, v)))
    if dq is not None:
        p.dq, p.dq_stride_b, p.dq_stride_h, p.dq_stride_n = call.tokens(dq)
    if dk is not None:
        p.dk, p.dk_stride_b, p.dk_stride_h, p.dk_stride_n = call.tokens(dk)
    if dv is not None:
        p.dv, p.dv_stride_b, p.dv_stride_h, p.dv_stride_n = call.tokens(dv)
    dpos_key, p.dpos_key = call.table_gradient(problem.pos_key if needs[3] else None)
    dpos_query, p.dpos_query = call.table_gradient(problem.pos_query if needs[4] else None)
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
    call = _Call(problem, library, whole=True)
    packed = torch.empty(library.prepared_bytes(call.params), dtype=torch.uint8, device="cpu")
    library.call("dk_cpu_prepare", call.params, packed.data_ptr())
    return packed


def _wrong_prepared(prepared: Tensor, library: Library, params: AttentionParams) -> ValueError:
    return ValueError(
        f"prepared must be what prepare returned for these tables, uint8 of {library.prepared_bytes(params)} bytes, "
        f"got {prepared.dtype} of shape {tuple(prepared.shape)} and strides {prepared.stride()}; prepare the tables "
        "again."
    )


class _Call:
    """The arguments of one native call, and the copies that live as long as it does.

    Each tensor is checked where its address is taken: the kernel reads and writes there whatever is there.
    """

    def __init__(
        self, problem: AttentionProblem, library: Library, prepared: Tensor | None = None, *, whole: bool = False
    ) -> None:
        """Take what forward and backward have in common.

        Args:
            problem: the call.
            library: which will compute it.
            prepared: the tables as `prepare` laid them out; then they are read there.
            whole: take all rows of the tables, not only those that the call can reach.
        """
        self.problem = problem
        self.copies: list[Tensor] = []
        self.params = p = AttentionParams()
        q, masks, cu_seqlens = problem.q, problem.masks, problem.cu_seqlens
        p.abi_version, p.dtype, p.threads = native.ABI_VERSION, native.DTYPES[q.dtype], library.threads()
        batch, heads, nq, head_dim = q.shape
        nk = problem.k.shape[2]
        if cu_seqlens is not None:
            batch, nq, nk = cu_seqlens.shape[0] - 1, problem.max_seqlen, problem.max_seqlen
            p.cu_seqlens, _ = self.values(cu_seqlens)
        p.batch, p.heads, p.nq, p.nk, p.head_dim = batch, heads, nq, nk, head_dim
        p.q, p.q_stride_b, p.q_stride_h, p.q_stride_n = self.tokens(q)
        p.k, p.k_stride_b, p.k_stride_h, p.k_stride_n = self.tokens(problem.k)
        p.v, p.v_stride_b, p.v_stride_h, p.v_stride_n = self.tokens(problem.v)
        p.scale, p.prefix_length, p.smooth = problem.scale, problem.position.prefix_length, 1
        if problem.pos_key is not None or problem.pos_query is not None or prepared is not None:
            self._add_tables(nq, nk, prepared, whole)
        if masks.key is not None:
            address, (stride, _) = self.values(masks.key)
            p.key_mask, p.key_mask_stride_b = address, stride
            if masks.query is masks.key:
                p.query_mask, p.query_mask_stride_b = address, stride
        if masks.query is not None and masks.query is not masks.key:
            p.query_mask, (p.query_mask_stride_b, _) = self.values(masks.query)
        if masks.pair is not None:
            p.pair_mask, (p.pair_mask_stride_b, head, p.pair_mask_stride_q, _) = self.values(masks.pair)
            p.pair_mask_stride_h = head if masks.pair.shape[1] > 1 else 0
        p.dropout_scale = 1.0
        if problem.dropout_p > 0 and problem.seed is not None:
            self.values(problem.seed)
            p.dropout_threshold = dropout.threshold(problem.dropout_p)
            p.dropout_scale, p.seed = dropout.keep_scale(problem.dropout_p), int(problem.seed)

    def _add_tables(self, nq: int, nk: int, prepared: Tensor | None, whole: bool) -> None:
        """Take the rows that the call can reach; packing the others would be wasted."""
        p, problem = self.params, self.problem
        pos_key, pos_query, first = problem.pos_key, problem.pos_query, problem.position.first_row
        table = pos_key if pos_key is not None else pos_query
        end = first if table is None else first + table.shape[1]
        index, start, stop = call_index(nq, nk, problem.position)
        if start < first or stop > end:
            check_reachable_rows(problem)  # which goes on where no key has a position
            if not whole:  # the kernel would index rows that the tables lack
                check_storages(problem)
                self.skipped = 0
                return
        if whole or prepared is not None:
            start, stop = first, end
        self.skipped, p.table_rows, p.first_row = start - first, stop - start, start
        p.has_pos_key, p.has_pos_query = pos_key is not None, pos_query is not None
        if prepared is not None:
            for x in (pos_key, pos_query):
                if x is not None and not storage_fits(x):
                    check_storages(problem)
            laid_out = prepared.dtype is torch.uint8 and prepared.dim() == 1 and prepared.is_contiguous()
            p.prepared, _ = self.values(prepared)
            p.prepared_bytes = prepared.nbytes if laid_out else _NO_SIZE
        else:
            if pos_key is not None:
                address, (p.pos_key_stride_h, row, _) = self.values(pos_key)
                p.pos_key, p.pos_key_stride_r = address + self.skipped * row * pos_key.itemsize, row
            if pos_query is not None:
                address, (p.pos_query_stride_h, row, _) = self.values(pos_query)
                p.pos_query, p.pos_query_stride_r = address + self.skipped * row * pos_query.itemsize, row
        p.delta, p.reach = index.delta.data_ptr(), index.reach
        p.low_end, p.high_start, p.smooth = index.low_end, index.high_start, index.smooth
        self.index = index  # whose table p.delta points into

    def table_gradient(self, table: Tensor | None) -> tuple[Tensor | None, int]:
        """Make the gradient of a whole table, and return where the rows in use begin, which the kernel fills."""
        if table is None:
            return None, 0
        gradient = torch.empty(table.shape, dtype=torch.float32, device=_CPU)
        rows = self.params.table_rows
        start, stop = self.skipped, self.skipped + rows
        for unreached in (gradient[:, :start], gradient[:, stop:]):
            unreached.zero_()
        return gradient, gradient[:, start:].data_ptr() if rows else 0

    def tokens(self, x: Tensor) -> tuple[int, int, int, int]:
        """Return the address of (B, H, N, D) and the strides of all but D, as `values`."""
        batch, heads, length, head_dim = x.shape
        b, h, n, d = x.stride()
        last = x.storage_offset() + (batch - 1) * b + (heads - 1) * h + (length - 1) * n + (head_dim - 1) * d
        if (last + 1) * x.itemsize > x.untyped_storage().nbytes():
            check_storages(self.problem)  # which goes on where there are no values
        if d != 1 or x.is_neg():
            x = x.resolve_neg().contiguous()
            self.copies.append(x)
            b, h, n, _ = x.stride()
        return x.data_ptr() or self.address(x), b, h, n

    def values(self, x: Tensor) -> tuple[int, tuple[int, ...]]:
        """Return the address and strides of x with a contiguous last dimension and no pending negation."""
        strides, ordinary = x.stride(), x.is_contiguous() and not x.storage_offset()
        if not (x.nbytes <= x.untyped_storage().nbytes() if ordinary else storage_fits(x)):
            check_storages(self.problem)
        if (not ordinary and strides[-1] != 1) or x.is_neg():
            x = x.resolve_neg().contiguous()
            self.copies.append(x)
            strides = x.stride()
        return x.data_ptr() or self.address(x), strides

    def address(self, x: Tensor) -> int:
        """Return where x is, or 0 if there is nothing of it."""
        address = x.data_ptr()
        if not address and x.numel():
            check_storages(self.problem)
            raise ValueError(f"a tensor of shape {tuple(x.shape)} must have memory, got none; pass a copy of it.")
        return address
