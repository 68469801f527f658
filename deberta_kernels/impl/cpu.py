"""Run attention in the native CPU library: hand it tensors. The kernels are in csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deberta_kernels import dropout, native
from deberta_kernels.checks.arguments import check_storage
from deberta_kernels.native import Library
from deberta_kernels.position import PositionIndex, position_index, reachable_rows
from deberta_kernels.types import AttentionProblem, Gradients, Masks, PositionSpec

__all__ = ["backward", "forward", "prepare", "refusal"]

_MAX_HEAD_DIM = 256


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
    problem = _reachable(problem)
    q = problem.q
    batch, heads, nq, head_dim = q.shape
    out = torch.empty(batch, nq, heads, head_dim, dtype=q.dtype, device="cpu").transpose(1, 2)
    lse = torch.empty(batch, heads, nq, dtype=torch.float32, device="cpu")
    if out.numel():
        call = _Call(problem, library, out=out, lse=lse)
        params = call.pack()
        _check_prepared(problem.prepared, library, params)
        library.call("dk_cpu_forward", params)
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
    whole = problem
    problem = _reachable(problem.changed(prepared=None))
    if not problem.q.numel():
        tensors = (whole.q, whole.k, whole.v, whole.pos_key, whole.pos_query)
        return Gradients(*(torch.zeros_like(x) if n and x is not None else None for n, x in zip(needs, tensors)))
    tokens = []
    for need, x in zip(needs, (problem.q, problem.k, problem.v)):
        batch, heads, length, head_dim = x.shape
        tokens.append(_empty(x.dtype, batch, length, heads, head_dim).transpose(1, 2) if need else None)
    tables, windows = _table_gradients(whole, problem, needs[3:])
    # The kernel takes both as rows of one layout, without gaps.
    lse, dlse = lse.resolve_neg().contiguous(), None if dlse is None else dlse.resolve_neg().contiguous()
    call = _Call(problem, library, out=out, lse=lse, dout=dout, dlse=dlse, tokens=tokens, tables=windows)
    library.call("dk_cpu_backward", call.pack())
    return Gradients(*tokens, *(None if g is None else g.to(problem.q.dtype) for g in tables))


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
    call = _Call(problem, library)
    params = call.pack()
    packed = torch.empty(
        library.handle.dk_cpu_prepared_bytes(params, library.variants[library.isa]), dtype=torch.uint8, device="cpu"
    )
    library.call("dk_cpu_prepare", params, packed.data_ptr())
    return packed


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return what the kernel writes gradients to: on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _check_prepared(prepared: Tensor | None, library: Library, params: bytes) -> None:
    """Check that prepared tables are as large as the kernel will read."""
    if prepared is None:
        return
    size = library.handle.dk_cpu_prepared_bytes(params, library.variants[library.isa])
    if prepared.dtype != torch.uint8 or prepared.shape != (size,) or not prepared.is_contiguous():
        raise ValueError(
            f"prepared must be what prepare returned for these tables, uint8 of {size} bytes, got {prepared.dtype} of "
            f"shape {tuple(prepared.shape)} and strides {prepared.stride()}; prepare the tables again."
        )


def _reachable(problem: AttentionProblem) -> AttentionProblem:
    """Cut the tables to the rows that this length can reach; packing the others would be wasted."""
    table = problem.pos_key if problem.pos_key is not None else problem.pos_query
    if table is None or problem.prepared is not None:
        return problem
    position = problem.position
    if problem.cu_seqlens is None:
        nq, nk = problem.q.shape[2], problem.k.shape[2] - position.prefix_length
    else:
        nq = nk = problem.max_seqlen
    start, stop = reachable_rows(nq, nk, position)
    if stop - start >= table.shape[1]:
        return problem
    rows = slice(start - position.first_row, stop - position.first_row)
    cut = [None if x is None else x[:, rows] for x in (problem.pos_key, problem.pos_query)]
    rest = PositionSpec(position.position_buckets, position.max_relative_positions, start, position.prefix_length)
    return problem.changed(pos_key=cut[0], pos_query=cut[1], position=rest)


def _table_gradients(
    whole: AttentionProblem, problem: AttentionProblem, needs: tuple[bool, ...]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Make the gradients of the whole tables, and views of the rows in use, which the kernel fills."""
    start = problem.position.first_row - whole.position.first_row
    gradients: list[Tensor | None] = []
    windows: list[Tensor | None] = []
    tables = ((whole.pos_key, problem.pos_key), (whole.pos_query, problem.pos_query))
    for need, (table, used) in zip(needs, tables):
        gradient = _empty(torch.float32, *table.shape) if need and table is not None else None
        window = None
        if gradient is not None and used is not None:
            stop = start + used.shape[1]
            window = gradient[:, start:stop]
            for unreached in (gradient[:, :start], gradient[:, stop:]):
                unreached.zero_()
        gradients.append(gradient)
        windows.append(window)
    return gradients, windows


def _plain(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension and its values in memory (a negation may be pending)."""
    return x if x.stride(-1) == 1 and not x.is_neg() else x.resolve_neg().contiguous()


class _Call:
    """The arguments of one call; keeps every tensor alive whose address it holds."""

    def __init__(
        self, problem: AttentionProblem, library: Library, *, out: Tensor | None = None, lse: Tensor | None = None,
        dout: Tensor | None = None, dlse: Tensor | None = None, tokens: list[Tensor | None] | None = None,
        tables: list[Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.library = problem, library
        self.out, self.lse, self.dout, self.dlse = out, lse, dout, dlse
        self.tokens = tokens or [None, None, None]
        self.tables = tables or [None, None]
        self.alive: list[Any] = []

    def pack(self) -> bytes:
        p = self.problem
        batch, heads, nq, head_dim = p.q.shape
        nk = p.k.shape[2]
        if p.cu_seqlens is not None:
            batch, nq, nk = p.cu_seqlens.numel() - 1, p.max_seqlen, p.max_seqlen
        dropping = p.dropout_p > 0 and p.seed is not None
        return native.ATTENTION_PARAMS.pack(
            native.ABI_VERSION, batch, heads, nq, nk, head_dim, native.DTYPES[p.q.dtype], self.library.threads(),
            *self._tokens(p.q), *self._tokens(p.k), *self._tokens(p.v), *self._tokens(self.out),
            *self._tokens(self.dout), *self._tokens(self.tokens[0]), *self._tokens(self.tokens[1]),
            *self._tokens(self.tokens[2]),
            *self._statistics(),
            *self._position(nq, nk),
            *self._masks(),
            p.scale,
            dropout.threshold(p.dropout_p) if dropping else 0,
            dropout.keep_scale(p.dropout_p) if dropping else 1.0,
            int(p.seed) if dropping and p.seed is not None else 0,
        )  # fmt: skip

    def _address(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        self.alive.append(x)
        address = x.data_ptr()
        if not address and x.numel():
            raise ValueError(f"a tensor of shape {tuple(x.shape)} must have memory, got none; pass a copy of it.")
        return address

    def _tokens(self, x: Tensor | None) -> tuple[int, int, int, int]:
        if x is None:
            return 0, 0, 0, 0
        x = _plain(x)
        b, h, n, _ = x.stride()
        return self._address(x), b, h, n

    def _statistics(self) -> tuple[int, int, int, int]:
        if self.lse is None:
            return 0, 0, 0, 0
        b, h, _ = self.lse.stride()
        return self._address(self.lse), self._address(self.dlse), b, h

    def _position(self, nq: int, nk: int) -> tuple[int, ...]:
        p, spec = self.problem, self.problem.position
        pos_key, pos_query = (x if x is None else _plain(x) for x in (p.pos_key, p.pos_query))
        table = pos_key if pos_key is not None else pos_query
        gradient = next((x for x in self.tables if x is not None), None)
        index: PositionIndex | None = position_index(max(nq, nk), spec) if table is not None else None
        return (
            self._address(pos_key), self._address(pos_query),
            *(pos_key.stride()[:2] if pos_key is not None else (0, 0)),
            *(pos_query.stride()[:2] if pos_query is not None else (0, 0)),
            self._address(p.prepared), self._address(self.tables[0]), self._address(self.tables[1]),
            gradient.stride(0) if gradient is not None else 0,
            int(pos_key is not None), int(pos_query is not None), table.shape[1] if table is not None else 0,
            spec.first_row, spec.prefix_length,
            *((self._address(index.delta), index.reach, index.low_end, index.high_start, int(index.smooth))
              if index is not None else (0, 0, 0, 0, 1)),
        )  # fmt: skip

    def _masks(self) -> tuple[int, ...]:
        masks = self.problem.masks
        key, query, pair = (x if x is None or x.stride(-1) == 1 else x.contiguous()
                            for x in (masks.key, masks.query, masks.pair))  # fmt: skip
        pair_strides = (0, 0, 0)
        if pair is not None:
            pair_strides = pair.stride(0), pair.stride(1) if pair.shape[1] > 1 else 0, pair.stride(2)
        cu_seqlens = self.problem.cu_seqlens
        return (
            self._address(key), self._address(query), self._address(pair),
            key.stride(0) if key is not None else 0, query.stride(0) if query is not None else 0, *pair_strides,
            self._address(cu_seqlens.contiguous() if cu_seqlens is not None else None),
        )  # fmt: skip
