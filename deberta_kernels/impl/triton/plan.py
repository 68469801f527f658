"""What the launches of one call have in common: tables, masks, strides and compile-time features.

Nothing in this file waits for a device or looks at the contents of a tensor, so it also works on `meta` tensors; a tool
that compiles the kernels for a machine that is not there gets its signatures this way.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deberta_kernels import dropout
from deberta_kernels.impl.common import LOG2E, extent, has_positions, masked, steps, unit_stride
from deberta_kernels.impl.gpu_tables import PREFIX_STEP, Window, check_prepared
from deberta_kernels.impl.triton import fences, tuning
from deberta_kernels.impl.triton.kernels import tile_list
from deberta_kernels.impl.triton.kernels.table_kernels import _disentangled_expand_kernel
from deberta_kernels.impl.triton.tables import DeviceTables, device_tables
from deberta_kernels.impl.triton.tensors import Tensors
from deberta_kernels.types import AttentionProblem, PositionSpec

__all__ = ["Call", "Launch", "Plan", "expand_launch", "mask_kind", "rows_of_program"]

# A row stride below this cannot overflow 32 bits inside one tile: 64 rows of 4 bytes are 2**8.
_MAX_ROW_STRIDE = 1 << 23
# Rows that a program of the expansion copies; nobody has measured others.
_EXPAND_ROWS = 32


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the jitted function.
        grid: programs per dimension.
        arguments: tensors and numbers by parameter name.
        constants: compile-time parameters by name.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, and the tensors they fill.

    Attributes:
        launches: what to run.
        results: (out, lse) of a forward, `Gradients` of a backward.
        tensors: how all tensors of these were made.
    """

    launches: list[Launch]
    results: Any
    tensors: Tensors


def expand_launch(
    pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec, tables: DeviceTables, covered: Window,
    tensors: Tensors,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """Plan the expansion of the position tables over the distances `covered`.

    Returns:
        the launch, and the (2, H, covered.rows, block of D) tensor it fills.
    """
    some = pos_key if pos_key is not None else pos_query
    if some is None:
        raise ValueError("pos_key or pos_query must be given to expand the tables; got neither.")
    heads, table_rows, head_dim = some.shape
    block = _block(head_dim)
    expanded = tensors.empty(2, heads, covered.rows, block, dtype=some.dtype, device=some.device)
    key, query = (tensors.readable(unit_stride, some if x is None else x) for x in (pos_key, pos_query))
    delta = tensors.made(operator.attrgetter("delta"), (tables,))
    arguments = {
        "pos_key_ptr": key, "pos_query_ptr": query, "expanded_ptr": expanded, "delta_ptr": delta,
        "stride_kh": key.stride(0), "stride_kn": key.stride(1), "stride_qh": query.stride(0),
        "stride_qn": query.stride(1), "rows": covered.rows, "skipped": covered.first - tables.first,
        "first_row": position.first_row, "table_rows": table_rows, "has_key": int(pos_key is not None),
        "has_query": int(pos_query is not None),
    }  # fmt: skip
    tile = rows_of_program(_EXPAND_ROWS, some.device)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": block, "TILE": tile}
    grid = (-(-covered.rows // tile), heads, 2)
    return Launch(_disentangled_expand_kernel, grid, arguments, constants, 4, 1), expanded


class Call:
    """What the launches of one call have in common."""

    def __init__(
        self, problem: AttentionProblem, config: tuning.TileConfig, precision: str, device_key: str,
        tensors: Tensors | None,
    ) -> None:  # fmt: skip
        self.problem, self.config = problem, config
        self.tensors = Tensors() if tensors is None else tensors
        q = problem.q
        _, self.heads, self.nq, self.head_dim = q.shape
        self.nk = problem.k.shape[2]
        self.packed = problem.cu_seqlens is not None
        self.batch, self.longest_q, self.longest_k = extent(problem)
        tile = config.tile
        self.prefix = problem.position.prefix_length
        self.biased = has_positions(problem)
        self.masked = mask_kind(problem)
        self.row_tiles = -(-self.longest_q // config.queries)
        prefix = self.prefix if self.biased else self.longest_k  # a key without a position is a prefix key
        aligned = prefix // PREFIX_STEP * PREFIX_STEP
        self.prefix_tiles = -(-prefix // tile)
        self.position_tiles = -(-(self.longest_k - aligned) // tile) if self.longest_k > prefix else 0
        self.key_tiles = self.prefix_tiles + self.position_tiles
        self.block = _block(self.head_dim)
        lanes = 16 // q.element_size()
        self.unit = lanes if self.head_dim % lanes == 0 else 1
        self.launches: list[Launch] = []
        self.features = {
            "HEAD_DIM": self.head_dim, "BLOCK_D": self.block, "QUERIES": config.queries, "TILE": tile,
            "UNIT": self.unit,
            # Masks without positions are rare: they take the kernel with positions, all keys being prefix keys, so
            # that there are eight variants: (no bias; bias without masks, with token masks, with pair masks) x dropout.
            "HAS_BIAS": self.biased or self.masked > 0, "MASKED": self.masked, "DROPOUT": problem.dropout_p > 0,
            "FENCED": fences.needed(device_key, config.num_stages),
            "STAGES": config.num_stages, "PRECISION": precision if q.dtype == torch.float32 else "ieee",
        }  # fmt: skip
        self.sizes = {
            "heads": self.heads, "nq": self.nq, "nk": self.nk, "prefix": prefix, "packed": int(self.packed),
            "cu_seqlens_ptr": self.nothing(torch.int32) if problem.cu_seqlens is None
            else self.tensors.readable(Tensor.contiguous, problem.cu_seqlens),
            "seed_ptr": problem.seed if problem.seed is not None else self.nothing(torch.int64),
            "threshold": dropout.threshold(problem.dropout_p), "keep_scale": dropout.keep_scale(problem.dropout_p),
            "qk_scale": problem.scale * LOG2E, "scale": problem.scale,
        }  # fmt: skip

    def nothing(self, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor to stand for a pointer that is never followed."""
        return self.tensors.nothing(dtype, self.problem.q.device)

    def add(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], stages: int | None = None) -> None:
        """Append a launch; of `arguments` and the shared sizes and features the kernel's own parameters are passed."""
        names = _parameters(kernel.fn)
        given = {name: x for name, x in (self.sizes | arguments).items() if name in names}
        constants = {name: x for name, x in self.features.items() if name in names}
        stages = self.config.num_stages if stages is None else stages
        self.launches.append(Launch(kernel, grid, given, constants, self.config.num_warps, stages))

    def tokens(self, *names: str) -> dict[str, Any]:
        """Return pointers and strides (in units) of q, k or v, copied first where a kernel cannot read them."""
        found: dict[str, Any] = {}
        for name in names:
            found.update(self.strided(name, name, getattr(self.problem, name)))
        return found

    def strided(self, name: str, letter: str, x: Tensor) -> dict[str, Any]:
        x = self.tensors.readable(_readable, x, self.unit)
        b, h, n = (stride // self.unit for stride in x.stride()[:3])
        return {f"{name}_ptr": x, f"stride_{letter}b": b, f"stride_{letter}h": h, f"stride_{letter}n": n}

    def key_masks(self) -> dict[str, Any]:
        """Return the arguments of key mask and pair mask, and list the occupied key tiles."""
        masks = self.problem.masks
        found: dict[str, Any] = {
            "key_mask_ptr": self.nothing(torch.uint8), "stride_mb": 0, "has_pair": 0,
            "pair_mask_ptr": self.nothing(torch.uint8), "stride_pb": 0, "stride_ph": 0, "stride_pm": 0, "stride_pn": 0,
            "tile_list_ptr": self.nothing(torch.int32), "list_size": 0,
        }  # fmt: skip
        if not self.masked:
            return found
        key = self.token_mask(masks.key, self.nk)
        found.update(key_mask_ptr=key, stride_mb=key.stride(0))
        prefix = self.prefix if self.biased else self.nk
        found["tile_list_ptr"], found["list_size"] = self.tile_list(key, self.key_tiles, prefix, masks.pair is not None)
        if masks.pair is not None:
            pair = self.tensors.same_start(masks.pair.view(torch.uint8), masks.pair)
            b, h, m, n = pair.stride()
            found.update(pair_mask_ptr=pair, has_pair=1, stride_pb=b, stride_pm=m, stride_pn=n)
            found["stride_ph"] = h if pair.shape[1] > 1 else 0
        return found

    def query_mask(self) -> dict[str, Any]:
        """Return the arguments of the query mask."""
        if not self.masked:
            return {"query_mask_ptr": self.nothing(torch.uint8), "stride_ub": 0}
        query = self.token_mask(self.problem.masks.query, self.nq)
        return {"query_mask_ptr": query, "stride_ub": query.stride(0)}

    def token_mask(self, mask: Tensor | None, length: int) -> Tensor:
        """Return a (B, length) mask as bytes that lie together; None is a mask of ones."""
        if mask is None:
            return self.tensors.made(_all_tokens, (), self.batch, length, self.problem.q.device)  # type: ignore[no-any-return]
        mask = self.tensors.readable(_side_by_side, mask)
        return self.tensors.same_start(mask.view(torch.uint8), mask)

    def tile_list(self, mask: Tensor, tiles: int, prefix: int, all_partial: bool) -> tuple[Tensor, int]:
        """Plan the list of a (B, length) mask, see `tile_list`; return it and its size."""
        size = tiles + 1
        found = self.tensors.empty(self.batch, tile_list.ROWS.value, size, dtype=torch.int32, device=mask.device)
        arguments = {
            "mask_ptr": mask, "tile_list_ptr": found, "stride_mb": mask.stride(0), "length": mask.shape[1],
            "prefix": prefix, "size": size, "all_partial": int(all_partial),
        }  # fmt: skip
        constants = {"TILE": self.config.tile}
        self.launches.append(
            Launch(tile_list._disentangled_tile_list_kernel, (self.batch,), arguments, constants, 4, 1)
        )
        return found, size

    def tables(self) -> dict[str, Any]:
        """Return the arguments of the expanded tables, prepared or planned here."""
        problem, q = self.problem, self.problem.q
        if not self.biased:
            empty = self.nothing(q.dtype)
            return {
                "pos_key_ptr": empty, "pos_query_ptr": empty, "low_end": 0, "high_start": 0, "table_offset": 0,
                "table_rows": 0,
            }  # fmt: skip
        positioned = self.longest_k - self.prefix
        length = max(self.longest_q, positioned)
        self.device_tables = self.tensors.made(device_tables, (), length, problem.position, q.device)
        if problem.prepared is not None:
            expanded = problem.prepared
            self.window = check_prepared(expanded, q, self.device_tables.full_window(), self.block)
        else:
            self.window = self.device_tables.window(self.longest_q, positioned)
            launch, expanded = expand_launch(
                problem.pos_key, problem.pos_query, problem.position, self.device_tables, self.window, self.tensors
            )
            self.launches.append(launch)
        return {
            "pos_key_ptr": self.tensors.same_start(expanded[0], expanded),
            "pos_query_ptr": self.tensors.made(operator.getitem, (expanded,), 1),
            "low_end": self.device_tables.ends.low_end, "high_start": self.device_tables.ends.high_start,
            "table_offset": self.window.offset, "table_rows": self.window.rows,
        }  # fmt: skip


@lru_cache(maxsize=64)
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def mask_kind(problem: AttentionProblem) -> int:
    """Return the MASKED that a call's kernels are compiled with, see `primitives`."""
    return 2 if problem.masks.pair is not None else int(masked(problem))


def rows_of_program(rows: int, device: torch.device) -> int:
    """Return how many table rows a program takes: on the CPU more, since the interpreter pays by the operation."""
    return 16 * rows if device.type == "cpu" else rows


def _block(head_dim: int) -> int:
    """Return the power of two, at least 16, that a matrix product needs for a head size."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _side_by_side(mask: Tensor) -> Tensor:
    """Return a mask whose tokens lie together in memory."""
    return mask if mask.stride(1) == 1 or mask.shape[1] == 1 else mask.contiguous()


def _all_tokens(batch: int, length: int, device: torch.device) -> Tensor:
    """Return a (B, length) mask of ones, in bytes."""
    return torch.ones(1, length, dtype=torch.uint8, device=device).expand(batch, length)


def _readable(x: Tensor, unit: int) -> Tensor:
    """Return x in memory that the kernels can read: unit last stride, and rows on 16-byte boundaries where D allows."""
    aligned = all(stride % unit == 0 for stride in steps(x)) and (unit == 1 or x.data_ptr() % 16 == 0)
    if x.stride(-1) == 1 and aligned and x.stride(2) < _MAX_ROW_STRIDE and not x.is_neg():
        return x
    return x.resolve_neg().transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
