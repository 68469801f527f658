"""Run the CUDA kernels' source on the CPU: build the emulation, launch it, return what it wrote.

The package's own code prepares the arguments, so what the emulation proves covers the host's side of a launch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deberta_kernels.impl.cuda.arguments import Arguments, Box, ForwardInfo, ForwardParams, TensorMap
from deberta_kernels.impl.cuda.backward_arguments import BackwardArguments, BackwardInfo, BackwardParams
from deberta_kernels.types import AttentionProblem, Gradients

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "csrc" / "cuda", Path(__file__).resolve().parent)
FLAGS = (
    "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered", "-fPIC", "-shared",
)  # fmt: skip
COMPILER = os.environ.get("CXX", "g++")


class EmulationError(RuntimeError):
    """The emulated device found a fault: a race, a deadlock, an address out of range."""


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
    found.emulated_info.restype = ForwardInfo
    found.emulated_backward_info.restype = BackwardInfo
    found.emulated_params_bytes.restype = found.emulated_backward_params_bytes.restype = ctypes.c_int64
    for name in (
        "emulated_map", "emulated_forward", "emulated_backward", "emulated_products", "emulated_copy",
        "emulated_driver_log",
    ):  # fmt: skip
        getattr(found, name).restype = ctypes.c_char_p
    found.emulated_value.restype = ctypes.c_float
    if found.emulated_params_bytes() != -(-ctypes.sizeof(ForwardParams) // 64) * 64:
        raise RuntimeError("ForwardParams does not mirror csrc/cuda/params.h")
    if found.emulated_backward_params_bytes() != -(-ctypes.sizeof(BackwardParams) // 64) * 64:
        raise RuntimeError("BackwardParams does not mirror csrc/cuda/params.h")
    return found


def encoder(library: ctypes.CDLL) -> Callable[[TensorMap, torch.dtype, Box], None]:
    """Return what fills a tensor map of the emulated device.

    It raises `EmulationError` for what the driver would refuse.
    """

    def encode(target: TensorMap, dtype: torch.dtype, box: Box) -> None:
        rank = len(box.sizes)
        refused = library.emulated_map(
            ctypes.byref(target), ctypes.c_uint64(box.address), rank, (ctypes.c_int64 * rank)(*box.sizes),
            (ctypes.c_int64 * rank)(*box.strides), (ctypes.c_int * rank)(*box.box),
        )  # fmt: skip
        if refused:
            raise EmulationError(refused.decode())

    return encode


def allow(library: ctypes.CDLL, memory: list[tuple[Tensor, bool]]) -> None:
    """Let the emulated kernels read these tensors, write those marked so, and nothing else."""
    spans = [span(x) for x, _ in memory]
    count = len(spans)
    library.emulated_memory(
        count,
        (ctypes.c_uint64 * count)(*(begin for begin, _ in spans)),
        (ctypes.c_uint64 * count)(*(end for _, end in spans)),
        (ctypes.c_int * count)(*(int(writable) for _, writable in memory)),
    )


class Launch:
    """One launch of the emulated forward, with the arguments that the package prepares."""

    def __init__(self, problem: AttentionProblem, library: ctypes.CDLL) -> None:
        self.problem, self.library = problem, library
        batch, heads, nq, self.head_dim = problem.q.shape
        self.out = torch.full((batch, nq, heads, self.head_dim), float("nan"), dtype=problem.q.dtype)
        self.lse = torch.full((batch, heads, nq), float("nan"))
        info: ForwardInfo = library.emulated_info(self.head_dim)
        self.arguments = Arguments(problem, info, encoder(library), self.out, self.lse)
        self.params, self.grid = self.arguments.params, self.arguments.blocks

    def run(self, blocks: range | None = None, seed: int = 0, late: int = -1) -> tuple[Tensor, Tensor]:
        """Run some blocks, or all; return out and lse, NaN where nothing was written.

        `late` is a warpgroup that runs only while nothing else can; -1: none.
        """
        self.library.emulated_late(late)
        blocks = blocks if blocks is not None else range(self.grid)
        allow(self.library, self.arguments.memory)
        problem = self.problem
        error = self.library.emulated_forward(
            ctypes.byref(self.params), int(problem.q.dtype == torch.bfloat16), self.head_dim,
            int(problem.masks.pair is not None), int(problem.dropout_p > 0), blocks.start, blocks.stop,
            ctypes.c_uint64(seed),
        )  # fmt: skip
        if error:
            raise EmulationError(error.decode())
        return self.out.transpose(1, 2), self.lse


class BackwardLaunch:
    """One launch of the emulated backward, with the arguments that the package prepares."""

    def __init__(
        self, problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor, library: ctypes.CDLL, *,
        dlse: Tensor | None = None, deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.problem, self.library = problem, library
        self.arguments = BackwardArguments(
            problem, dout, dlse, out, lse, library.emulated_backward_info(), encoder(library),
            deterministic=deterministic,
        )  # fmt: skip
        for x in (self.arguments.dq, self.arguments.dk, self.arguments.dv):
            x.fill_(float("nan"))
        self.params = self.arguments.params

    def run(self, blocks: Sequence[int] | None = None, seed: int = 0, late: int = -1) -> Gradients:
        """Run the blocks, in this order if one is given, and the conversion of dq; return the gradients.

        `late` is a warpgroup that runs only while nothing else can; -1: none.
        """
        self.library.emulated_late(late)
        order = list(range(self.arguments.blocks) if blocks is None else blocks)
        allow(self.library, self.arguments.memory)
        problem = self.problem
        error = self.library.emulated_backward(
            ctypes.byref(self.params), int(problem.q.dtype == torch.bfloat16), int(problem.masks.pair is not None),
            int(problem.dropout_p > 0), len(order), (ctypes.c_int * len(order))(*order), self.arguments.convert_blocks,
            ctypes.c_uint64(seed),
        )  # fmt: skip
        if error:
            raise EmulationError(error.decode())
        return self.arguments.gradients()


def span(x: Tensor) -> tuple[int, int]:
    """Return the addresses from the first element of x to behind the last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def run(problem: AttentionProblem, seed: int = 0, late: int = -1) -> tuple[Tensor, Tensor]:
    """Run a problem forward; `seed` is that of the order in which threads run, `late` as in `Launch.run`."""
    return Launch(problem, library()).run(seed=seed, late=late)
