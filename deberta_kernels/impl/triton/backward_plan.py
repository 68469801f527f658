"""The launches of a backward: statistics of the queries, dq, dk and dv, then the gradients of the position tables."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from deberta_kernels.impl.common import Needs, empty_tokens, has_positions, wanted
from deberta_kernels.impl.gpu_tables import PREFIX_STEP
from deberta_kernels.impl.triton import tuning
from deberta_kernels.impl.triton.kernels.key_grad import _disentangled_bwd_dkv_kernel
from deberta_kernels.impl.triton.kernels.position_grad import _disentangled_bwd_position_kernel
from deberta_kernels.impl.triton.kernels.query_grad import _disentangled_bwd_dq_kernel
from deberta_kernels.impl.triton.kernels.row_statistics import (
    _disentangled_bwd_preprocess_kernel,
    _disentangled_sum_kernel,
)
from deberta_kernels.impl.triton.kernels.table_kernels import _disentangled_fold_kernel
from deberta_kernels.impl.triton.plan import Call, Launch, Plan, rows_of_program
from deberta_kernels.impl.triton.tables import near_reach
from deberta_kernels.impl.triton.tensors import Tensors
from deberta_kernels.types import AttentionProblem, Gradients

__all__ = ["Backward"]

# Programs of the position gradient to aim for: two for each of the 132 multiprocessors of an H100.
_POSITION_PROGRAMS = 264
# Parts of the samples that are summed apart where diagonals and heads are few. Each has its own float32 copy of the
# gradients of both expanded tables, whose memory this bounds.
_MAX_PARTS = 4
# Rows that a program of the sum, and of the fold, takes at once, and distances of a row that the fold adds at once.
# Nobody has measured others: these kernels read their input once and multiply nothing.
_SUM_ROWS = 32
_FOLD_ROWS = 16
_FOLD_CHUNK = 8


def _as_tokens(x: Tensor) -> Tensor:
    """Return (B, H, N, D) in (B, N, H, D) memory."""
    inside = x.transpose(1, 2)
    return x if inside.is_contiguous() else inside.contiguous()


class Backward(Call):
    """The launches of one backward: statistics of the rows, dq, dk and dv, position gradients."""

    def __init__(
        self, problem: AttentionProblem, config: tuning.TileConfig, precision: str, device_key: str,
        tensors: Tensors | None, dout: Tensor, needs: Needs,
    ) -> None:  # fmt: skip
        super().__init__(problem, config, precision, device_key, tensors)
        self.dout, self.needs = dout, needs
        self.wanted = wanted(problem, needs)
        self.wants_tables = has_positions(problem) and any(x is not None for x in self.wanted[3:])
        # Whether two passes add the gradients of the tables in any order, or a third pass in one.
        anyhow = not torch.are_deterministic_algorithms_enabled()
        self.fused = self.wants_tables and anyhow
        # Masks without positions take the kernels with positions, also in this.
        self.features["FUSED"] = self.fused or (anyhow and self.masked > 0 and not self.biased)

    def plan(self, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Plan:
        q, k, v = (self.tensors.made(empty_tokens, (x,)) for x in (self.problem.q, self.problem.k, self.problem.v))
        shared = {**self.tokens("q", "k", "v"), **self.strided("dout", "o", self.dout), **self.tables()}
        shared.update(self.key_masks())
        self.preprocess(shared, out, lse, dlse)
        shared.update(self.sums())
        far, by_keys = None, self.needs[1] or self.needs[2] or self.fused
        # The pass by keys reads what the pass by queries writes: in float32, and where there is one tile of keys.
        if self.needs[0] or self.wants_tables or (by_keys and (q.dtype == torch.float32 or self.key_tiles == 1)):
            self.query_pass(shared, q)
            far = shared["far_ptr"]
        if by_keys:
            self.key_pass(shared, k, v)
        tables = self.table_gradients(shared, far)
        dq, dk, dv = (x if need else None for x, need in zip((q, k, v), self.needs))
        return Plan(self.launches, Gradients(dq, dk, dv, *tables), self.tensors)

    def preprocess(self, shared: dict[str, Any], out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
        device = self.problem.q.device
        batch, heads, nq = lse.shape
        stats = self.tensors.empty(7, batch, heads, nq, dtype=torch.float32, device=device)
        groups = self.batch * heads
        partial = self.nothing(torch.float32)
        if self.masked:
            partial = self.tensors.empty(groups, self.row_tiles, self.block, dtype=torch.float32, device=device)
        shared.update(stats_ptr=stats, stats_size=batch * heads * nq, row_tiles=self.row_tiles)
        out, lse = self.tensors.readable(_as_tokens, out), self.tensors.readable(Tensor.contiguous, lse)
        strides = dlse.stride() if dlse is not None else (0, 0, 0)
        self.add(
            _disentangled_bwd_preprocess_kernel,
            (groups * self.row_tiles,),
            {
                **shared, "out_ptr": out, "lse_ptr": lse, "dmean_ptr": partial,
                "dlse_ptr": self.nothing(torch.float32) if dlse is None else dlse, "has_dlse": int(dlse is not None),
                "stride_lb": strides[0], "stride_lh": strides[1], "stride_ln": strides[2],
            },
        )  # fmt: skip
        shared["dmean_ptr"] = self.summed(partial, groups) if self.masked and self.needs[2] else partial

    def summed(self, parts: Tensor, groups: int) -> Tensor:
        """Plan the sum of (groups, n, block) over n."""
        n = parts.numel() // (groups * self.block)
        total = self.tensors.empty(groups, self.block, dtype=torch.float32, device=parts.device)
        arguments = {"parts_ptr": parts, "sum_ptr": total, "n": n}
        constants = {"BLOCK_D": self.block, "ROWS": _SUM_ROWS}
        self.launches.append(Launch(_disentangled_sum_kernel, (groups,), arguments, constants, 4, 1))
        return total

    def query_pass(self, shared: dict[str, Any], dq: Tensor) -> None:
        grid = (self.batch * self.heads * self.row_tiles,)
        self.add(_disentangled_bwd_dq_kernel, grid, {**shared, "dq_ptr": dq})

    def key_pass(self, shared: dict[str, Any], dk: Tensor, dv: Tensor) -> None:
        arguments = {**shared, "dk_ptr": dk, "dv_ptr": dv, "key_tiles": self.key_tiles}
        arguments.update(row_list_ptr=self.nothing(torch.int32), row_list_size=0)
        if self.masked:
            query = self.query_mask()["query_mask_ptr"]
            rows, size = self.tile_list(query, self.row_tiles, self.nq, False)
            arguments.update(row_list_ptr=rows, row_list_size=size)
        self.add(_disentangled_bwd_dkv_kernel, (self.batch * self.heads * self.key_tiles,), arguments)

    def table_gradients(self, shared: dict[str, Any], far: Tensor | None) -> list[Tensor | None]:
        """Plan the gradients of the position tables; return them."""
        tables = self.wanted[3:]
        if not self.wants_tables or far is None:
            return [None if x is None else self.tensors.zeros(*x.shape, dtype=x.dtype, device=x.device) for x in tables]
        if self.fused:
            near, parts = shared["near_ptr"], 1
        else:
            far = self.summed(far, 4 * self.heads)
            near, parts = self.near_gradients(shared)
        found = [None if x is None else self.tensors.empty(*x.shape, dtype=x.dtype, device=x.device) for x in tables]
        self.fold(near, far, found, parts)
        return found

    def sums(self) -> dict[str, Any]:
        """Return zeroed sums for the gradients of the tables, float32, in one piece of memory.

        far: (2 tables, 2 sides, H, far_size, block), of the saturated pairs; near: (2 tables, H, rows, block), of the
        expanded tables, where they are added to.
        """
        far_size = 1 if self.fused else self.batch * self.row_tiles
        far = 4 * self.heads * far_size * self.block if self.biased else 0
        near = 2 * self.heads * self.window.rows * self.block if self.fused else 0
        both = self.tensors.zeros(far + near, dtype=torch.float32, device=self.problem.q.device)
        behind = self.tensors.made(torch.narrow, (both,), 0, far, near)
        return {"far_ptr": self.tensors.same_start(both[:far], both), "near_ptr": behind, "far_size": far_size}

    def near_gradients(self, shared: dict[str, Any]) -> tuple[Tensor, int]:
        """Plan the gradients of the expanded tables: (2 tables, parts * 2, H, rows, block) float32."""
        tile, shift = self.config.tile, self.prefix % PREFIX_STEP
        left, right = near_reach(self.device_tables.ends, shift, tile)
        first, last = max(1 - right, 1 - self.position_tiles), min(left - 1, self.row_tiles - 1)
        diagonals = last - first + 1
        parts = min(_POSITION_PROGRAMS // (diagonals * self.heads), _MAX_PARTS, self.batch * self.row_tiles)
        parts = max(parts, 1)
        size = (2, parts * 2, self.heads, self.window.rows, self.block)
        near = self.tensors.zeros(*size, dtype=torch.float32, device=self.problem.q.device)
        arguments = {**shared, "near_ptr": near, "samples": self.batch, "first_diagonal": first, "parts": parts}
        self.add(_disentangled_bwd_position_kernel, (diagonals, self.heads, parts), arguments, stages=1)
        return near, parts * 2

    def fold(self, near: Tensor, far: Tensor, gradients: list[Tensor | None], parts: int) -> None:
        tables = self.device_tables
        some = next(x for x in gradients if x is not None)
        key, query = (some if x is None else x for x in gradients)
        arguments = {
            "near_ptr": near, "far_ptr": far, "dpos_key_ptr": key, "dpos_query_ptr": query,
            "has_key": int(gradients[0] is not None), "has_query": int(gradients[1] is not None),
            "order_ptr": self.tensors.made(attrgetter("order"), (tables,)),
            "bounds_ptr": self.tensors.made(attrgetter("bounds"), (tables,)), "rows": self.window.rows,
            "skipped": self.window.first - tables.first, "first_row": self.problem.position.first_row,
            "table_rows": some.shape[1], "parts": parts, "heads": self.heads, "low_row": tables.low_row,
            "high_row": tables.high_row, "scale": self.problem.scale,
        }  # fmt: skip
        rows = rows_of_program(_FOLD_ROWS, some.device)
        constants = {"HEAD_DIM": self.head_dim, "BLOCK_D": self.block, "ROWS": rows, "CHUNK": _FOLD_CHUNK}
        grid = (-(-some.shape[1] // rows), self.heads, 2)
        self.launches.append(Launch(_disentangled_fold_kernel, grid, arguments, constants, 4, 1))
