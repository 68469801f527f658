"""Run a kernel on the CPU: `Machine(ptx).launch(...)`."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Iterable, Sequence
from ctypes import c_char, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache

import numpy as np

from ptx.build import library
from ptx.errors import PtxError
from ptx.program import ROW_SIZES, Program
from ptx.tensor_map import TENSOR_MAP_SIZE

__all__ = ["Machine", "Memory"]


COUNTS = 5  # by instruction


@dataclass(frozen=True)
class Memory:
    """Global memory that a launch may touch.

    Attributes:
        address, size: in bytes.
        granule: bytes of an element; accesses to different elements never race.
        writable: whether the kernel may write it.
    """

    address: int
    size: int
    granule: int = 4
    writable: bool = True


class _Range(ctypes.Structure):
    _fields_ = (
        ("begin", c_uint64), ("end", c_uint64), ("granule", c_int32), ("writable", c_int32),
    )  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = (
        ("instructions", c_void_p), ("length", c_int64), ("operands", c_void_p), ("settings", c_void_p),
        ("initial", c_void_p), ("initials", c_int64), ("words", c_int64), ("shared", c_int64), ("threads", c_int64),
        ("products", c_int64), ("unit", c_int64), ("local", c_int64),
    )  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = (
        ("program", _Program), ("grid", c_int64 * 3), ("blocks", c_void_p), ("block_count", c_int64),
        ("ranges", c_void_p), ("range_count", c_int64), ("parameters", c_void_p), ("parameter_bytes", c_int64),
        ("seed", c_uint64), ("late", c_uint64), ("counts", c_void_p), ("excused", c_int64),
    )  # fmt: skip


class _Error(ctypes.Structure):
    _fields_ = (
        ("instruction", c_int64), ("block", c_int64), ("warp", c_int32), ("lane", c_int32), ("what", c_char * 600),
    )  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    """Load the machine, and compare the structures that both sides know."""
    found = library()
    sizes = [
        ctypes.sizeof(_Launch),
        ctypes.sizeof(_Error),
        *ROW_SIZES,
        ctypes.sizeof(_Range),
        8 * COUNTS,
        TENSOR_MAP_SIZE,
    ]
    there = list((c_int64 * len(sizes)).in_dll(found, "ptx_sizes"))
    if there != sizes:
        raise RuntimeError(f"the structures of tools/ptx and of its cpp/ have {sizes} and {there} bytes")
    return found


class Machine:
    """One kernel, ready to run.

    Attributes:
        program: the kernel as arrays.
        counts: by instruction: executed by warps, wavefronts of shared memory, wavefronts that would have been needed
            without bank conflicts, sectors and bytes of global memory; added up over all launches.
        excused: stores that would be races were the same value not there already; of the last launch.
    """

    def __init__(self, ptx: str, name: str | None = None, *, shared_bytes: int = 0, threads: int = 0) -> None:
        """Read a kernel.

        Args:
            ptx: the text of a module.
            name: of the kernel; None: its only one.
            shared_bytes: of dynamic shared memory.
            threads: of a block; 0: as the PTX says.

        Raises:
            PtxSyntaxError: an opcode or form that the machine does not know.
        """
        self.program = Program(ptx, name)
        self.threads = threads or self.program.kernel.threads
        if self.threads % 32 or not 32 <= self.threads <= 1024:
            raise ValueError(f"threads must be a multiple of 32 from 32 to 1024, got {self.threads}.")
        self.shared_bytes = self.program.kernel.shared_bytes + shared_bytes
        self.counts = np.zeros((len(self.program.instructions), COUNTS), np.int64)
        self.excused = 0

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return self.program.kernel.name

    def launch(
        self, grid: Sequence[int], arguments: bytes, memory: Iterable[Memory], *, seed: int = 0,
        late: Iterable[int] = (), blocks: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Run blocks, one after another.

        Args:
            grid: blocks along x, y and z; missing ones are 1.
            arguments: the parameters, laid out as the kernel has them.
            memory: what may be touched.
            seed: of the order in which warps run.
            late: warps that run only while no other can.
            blocks: which to run, in this order; None: all, in an order drawn from the seed.

        Raises:
            PtxError: the kernel did something wrong.
        """
        sizes = (*grid, 1, 1)[:3]
        if blocks is None:
            blocks = list(range(sizes[0] * sizes[1] * sizes[2]))
            random.Random(seed).shuffle(blocks)
        if len(arguments) < self.program.kernel.parameter_bytes:
            wanted = self.program.kernel.parameter_bytes
            raise ValueError(f"arguments must have {wanted} bytes, got {len(arguments)}.")
        order = np.array(blocks, np.int64)
        ranges = [_Range(m.address, m.address + m.size, m.granule, m.writable) for m in memory]
        table = (_Range * max(len(ranges), 1))(*ranges)
        # Tensor maps stand on boundaries of 64 bytes.
        held = ctypes.create_string_buffer(len(arguments) + 64)
        start = -ctypes.addressof(held) % 64
        ctypes.memmove(ctypes.addressof(held) + start, arguments, len(arguments))
        launch = _Launch(
            self._arrays(), (c_int64 * 3)(*sizes), order.ctypes.data, len(order), ctypes.addressof(table), len(ranges),
            ctypes.addressof(held) + start, len(arguments), seed, sum(1 << warp for warp in late),
            self.counts.ctypes.data, 0,
        )  # fmt: skip
        error = _Error()
        if _library().ptx_run(ctypes.byref(launch), ctypes.byref(error)):
            raise self._error(error, seed)
        self.excused = launch.excused

    def _arrays(self) -> _Program:
        p = self.program
        return _Program(
            p.instructions.ctypes.data, len(p.instructions), p.operands.ctypes.data, p.settings.ctypes.data,
            p.initial.ctypes.data, len(p.initial), p.words, self.shared_bytes, self.threads, int(p.products),
            p.smallest_access, p.kernel.local_bytes,
        )  # fmt: skip

    def _error(self, error: _Error, seed: int) -> PtxError:
        p = self.program
        line = p.lines[error.instruction] if error.instruction >= 0 else 0
        what = _with_lines(error.what.decode(errors="replace"), p.lines)
        text = p.source[line - 1].strip() if line else ""
        return PtxError(what, self.name, line, text, error.block, error.warp, error.lane, seed)


def _with_lines(what: str, lines: list[int]) -> str:
    """Return a message with lines of the PTX in the place of numbers of instructions."""
    return re.sub(r"instruction (\d+)", lambda m: f"line {lines[int(m[1])]}", what)
