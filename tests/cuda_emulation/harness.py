"""Run the CUDA kernels' source on the CPU: build the emulation, fill its arguments, return what it wrote.

`Launch` is the host's side of a launch, as csrc/cuda/README.md states it, the emulated device taking libcuda's place.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deberta_kernels import dropout
from deberta_kernels.position import position_index
from deberta_kernels.types import AttentionProblem

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "csrc" / "cuda", Path(__file__).resolve().parent)
FLAGS = (
    "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered", "-fPIC", "-shared",
)  # fmt: skip
COMPILER = os.environ.get("CXX", "g++")
LOG2E = 1.4426950408889634


class EmulationError(RuntimeError):
    """Say what the emulated device found: a race, a deadlock, an address out of range."""


class Info(ctypes.Structure):
    """`ForwardInfo` of csrc/cuda/params.h."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("abi_version", "head_dim", "rows", "keys", "threads", "shared_bytes", "table_margin")
    ]


class Map(ctypes.Structure):
    """`TensorMap` of csrc/cuda/params.h."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class Params(ctypes.Structure):
    """`ForwardParams` of csrc/cuda/params.h."""

    _fields_ = [
        *((name, Map) for name in ("k", "v", "pos_key", "pos_query")),
        *((name, ctypes.c_int64) for name in (
            "q", "q_stride_b", "q_stride_h", "q_stride_n", "out", "lse", "pos_key_rows", "pos_query_rows", "table_rows",
            "table_offset", "low_end", "high_start", "mean", "key_mask", "key_mask_stride_b", "query_mask",
            "query_mask_stride_b", "pair_mask", "pair_mask_stride_b", "pair_mask_stride_h", "pair_mask_stride_m",
            "pair_mask_stride_n", "cu_seqlens", "seed", "batch", "heads", "nq", "nk", "prefix", "row_tiles",
            "dropout_threshold",
        )),
        ("qk_scale", ctypes.c_double),
        ("keep_scale", ctypes.c_double),
    ]  # fmt: skip


def build(changes: tuple[tuple[str, str], ...] = ()) -> Path:
    """Compile the emulation, unless these very sources have been compiled before; return the library.

    Args:
        changes: pieces of the kernels' source to replace, (old, new); each old piece must be there. A changed source is
            compiled for one kernel only, bfloat16 with head size 64.
    """
    sources = {p.name: p.read_text() for folder in SOURCES for p in (*folder.glob("*.h"), *folder.glob("*.cpp"))}
    for old, new in changes:
        holders = [name for name, text in sources.items() if old in text]
        if not holders:
            raise ValueError(f"{old!r} is not in the sources")
        for name in holders:
            sources[name] = sources[name].replace(old, new)
    flags = (*FLAGS, "-O0", "-DDK_ONE_KERNEL") if changes else FLAGS
    digest = hashlib.sha256(repr((flags, sorted(sources.items()))).encode()).hexdigest()[:16]
    target = ROOT / "build" / "cuda_emulation" / f"{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            folder = Path(name)
            for file, text in sources.items():
                (folder / file).write_text(text)
            command = [COMPILER, *flags, f"-I{folder}", str(folder / "library.cpp")]
            done = subprocess.run(
                [*command, "-o", str(folder / "library.so")], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"the emulation does not compile:\n{done.stderr[-4000:]}")
            os.replace(folder / "library.so", target)
    return target


@cache
def library(changes: tuple[tuple[str, str], ...] = ()) -> ctypes.CDLL:
    """Load the emulation, see `build`."""
    found = ctypes.CDLL(str(build(changes)))
    found.emulated_info.restype = Info
    found.emulated_params_bytes.restype = ctypes.c_int64
    for name in ("emulated_map", "emulated_forward", "emulated_products", "emulated_copy"):
        getattr(found, name).restype = ctypes.c_char_p
    found.emulated_value.restype = ctypes.c_float
    if found.emulated_params_bytes() != -(-ctypes.sizeof(Params) // 64) * 64:
        raise RuntimeError("Params does not mirror csrc/cuda/params.h")
    return found


def tensor_map(library: ctypes.CDLL, target: Map, x: Tensor, order: tuple[int, ...]) -> None:
    """Describe a tensor, its dimensions in this order, innermost first; boxes are 64 rows of 64 elements.

    Raises:
        EmulationError: the driver would refuse it.
    """
    rank = len(order)
    sizes = (ctypes.c_int64 * rank)(*(x.shape[i] for i in order))
    # A dimension of one element is never stepped along, whatever its stride.
    strides = (ctypes.c_int64 * rank)(*(x.stride(i) * 2 if x.shape[i] > 1 else 16 for i in order))
    strides[0] = x.stride(order[0]) * 2
    box = (ctypes.c_int * rank)(64, 64, *([1] * (rank - 2)))
    refused = library.emulated_map(ctypes.byref(target), ctypes.c_uint64(x.data_ptr()), rank, sizes, strides, box)
    if refused:
        raise EmulationError(refused.decode())


class Launch:
    """One launch of the emulated forward: arguments, and every tensor whose address they hold."""

    def __init__(self, problem: AttentionProblem, library: ctypes.CDLL) -> None:
        self.problem, self.library = problem, library
        self.head_dim = problem.q.shape[-1]
        self.info: Info = library.emulated_info(self.head_dim)
        self.memory: list[tuple[Tensor, bool]] = []
        size = ctypes.sizeof(Params)
        self.buffer = ctypes.create_string_buffer(size + 128)  # a tensor map lies on a 64-byte boundary
        self.params = Params.from_buffer(self.buffer, -ctypes.addressof(self.buffer) % 64)
        self._fill()

    def run(self, blocks: range | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Run some blocks, or all; return out and lse, NaN where nothing was written."""
        blocks = blocks if blocks is not None else range(self.grid)
        spans = [_span(x) for x, _ in self.memory]
        count = len(spans)
        self.library.emulated_memory(
            count,
            (ctypes.c_uint64 * count)(*(begin for begin, _ in spans)),
            (ctypes.c_uint64 * count)(*(end for _, end in spans)),
            (ctypes.c_int * count)(*(int(writable) for _, writable in self.memory)),
        )
        problem = self.problem
        error = self.library.emulated_forward(
            ctypes.byref(self.params), int(problem.q.dtype == torch.bfloat16), self.head_dim,
            int(problem.masks.pair is not None), int(problem.dropout_p > 0), blocks.start, blocks.stop,
            ctypes.c_uint64(seed),
        )  # fmt: skip
        if error:
            raise EmulationError(error.decode())
        return self.out.transpose(1, 2), self.lse

    def _address(self, x: Tensor | None, writable: bool = False) -> int:
        if x is None:
            return 0
        self.memory.append((x, writable))
        return x.data_ptr()

    def _map(self, name: str, x: Tensor, order: tuple[int, ...]) -> None:
        self._address(x)
        tensor_map(self.library, getattr(self.params, name), x, order)

    def _fill(self) -> None:
        p, problem = self.params, self.problem
        q = _readable(problem.q, 2)
        k, v = _readable(problem.k, 8), _readable(problem.v, 8)
        batch, p.heads, p.nq, _ = q.shape
        p.nk = k.shape[2]
        packed = problem.cu_seqlens is not None
        p.batch = problem.cu_seqlens.numel() - 1 if packed else batch
        p.row_tiles = -(-(problem.max_seqlen if packed else p.nq) // self.info.rows)
        self.grid = p.batch * p.heads * p.row_tiles
        p.q = self._address(q)
        p.q_stride_b, p.q_stride_h, p.q_stride_n = q.stride()[:3]
        for name, x in (("k", k), ("v", v)):
            self._map(name, x, (3, 2, 1, 0))
        self.out = torch.full((batch, p.nq, p.heads, self.head_dim), float("nan"), dtype=q.dtype)
        self.lse = torch.full((batch, p.heads, p.nq), float("nan"))
        p.out, p.lse = self._address(self.out, True), self._address(self.lse, True)
        p.cu_seqlens = self._address(problem.cu_seqlens)
        p.qk_scale, p.keep_scale = problem.scale * LOG2E, 1.0
        if problem.dropout_p > 0:
            p.dropout_threshold = dropout.threshold(problem.dropout_p)
            p.keep_scale = dropout.keep_scale(problem.dropout_p)
            p.seed = self._address(problem.seed)
        self._fill_tables(q)
        self._fill_masks()

    def _fill_tables(self, q: Tensor) -> None:
        p, problem, position = self.params, self.problem, self.problem.position
        p.prefix = position.prefix_length
        given = problem.pos_key if problem.pos_key is not None else problem.pos_query
        if given is None or p.prefix >= p.nk:
            p.prefix = p.nk
            return
        index = position_index(max(p.nq, p.nk), position)
        p.low_end, p.high_start = min(index.low_end, -1), max(index.high_start, 0)
        first = max(p.low_end, min(1 - (p.nk - p.prefix), -1)) - self.info.table_margin
        last = min(p.high_start, max(p.nq - 1, 0)) + self.info.table_margin
        p.table_rows, p.table_offset = last - first, -first
        distances = torch.arange(first, last).clamp(-index.reach, index.reach)
        rows = (index.delta[distances + index.reach].long() - position.first_row).clamp(0, given.shape[1] - 1)
        for name, table in (("pos_key", problem.pos_key), ("pos_query", problem.pos_query)):
            expanded = (table if table is not None else torch.zeros_like(given))[:, rows].contiguous()
            self._map(name, expanded, (2, 1, 0))
            setattr(p, f"{name}_rows", expanded.data_ptr())

    def _fill_masks(self) -> None:
        p, masks = self.params, self.problem.masks
        key, query, pair = masks.key, masks.query, masks.pair
        if key is None and query is None and pair is None:
            return
        p.mean = self._address(self.problem.v.float().mean(2).contiguous())
        if key is not None:
            key = key if key.stride(1) == 1 else key.contiguous()
            p.key_mask, p.key_mask_stride_b = self._address(key), key.stride(0)
        if query is not None:
            query = query if query.stride(1) == 1 else query.contiguous()
            p.query_mask, p.query_mask_stride_b = self._address(query), query.stride(0)
        if pair is not None:
            p.pair_mask = self._address(pair)
            p.pair_mask_stride_b, head, p.pair_mask_stride_m, p.pair_mask_stride_n = pair.stride()
            p.pair_mask_stride_h = head if pair.shape[1] > 1 else 0


def _readable(x: Tensor, unit: int) -> Tensor:
    """Return x in memory that the kernel can read, its rows at multiples of `unit` elements."""
    strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    aligned = x.stride(-1) == 1 and all(s > 0 and s % unit == 0 for s in strides) and x.data_ptr() % (2 * unit) == 0
    return x if aligned else x.contiguous()


def _span(x: Tensor) -> tuple[int, int]:
    """Return the addresses from the first element of x to behind the last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def run(problem: AttentionProblem, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Run a problem forward; `seed` is that of the order in which threads run."""
    return Launch(problem, library()).run(seed=seed)
