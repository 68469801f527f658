"""csrc/cuda, compiled with nvcc, and what comes out counted."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deberta_kernels.impl.cuda.modules import MODULES, NVCC_FLAGS, ModuleSpec, constants
from offline.counting import Counts, zones
from offline.listing import read_sass

__all__ = [
    "MODULES", "SOURCES", "CudaReport", "Usage", "compile_module", "disassembler", "full_tile", "nvcc", "read_log",
    "release", "run_compiler",
]  # fmt: skip

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# What turns a kernel into plain flash attention, by pass: the file, and what takes its near tiles away.
PLAIN = {
    "forward": (
        "consumer.h", "if (info.zone == kNearFirst) near_run(info);\n      else far_zone(info);", "far_zone(info);"
    ),
    "backward": (
        "key_consumer.h", "visit = visit.zone() == kNearFirst ? near_run() : far_zone(visit);",
        "visit = far_zone(visit);",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CudaReport:
    """What one kernel compiled to.

    Attributes:
        registers: per thread at launch; consumers take more from the producer.
        spills: bytes that spilled registers store and load.
        shared: bytes of dynamic shared memory per block.
        serialised: warnings that matrix products run one by one.
        near: one pass of the loop over full near tiles, 64 x 64 pairs per warpgroup.
        far: the same of the loop over far tiles.
        plain: the same of plain flash attention, from the same source without near tiles.
    """

    registers: int
    spills: int
    shared: int
    serialised: int
    near: Counts
    far: Counts
    plain: Counts | None = None


def nvcc() -> str | None:
    """Return the compiler, NVCC or the nvcc on the PATH."""
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def release() -> str:
    """Return the compiler's version, such as "13.0"."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def disassembler() -> str | None:
    """Return nvdisasm, on the PATH or in an installed Triton."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton and triton.origin else None
    return str(path) if path and path.exists() else None


@dataclass(frozen=True)
class Usage:
    """What the assembler says of one kernel; see `CudaReport`."""

    registers: int
    spills: int
    serialised: int


def compile_module(spec: ModuleSpec) -> dict[str, CudaReport]:
    """Compile one module for sm_90a, and plain flash attention to compare with; return a report per kernel.

    Kernels without tiles of pairs, such as the conversion of dq, are left out.

    Raises:
        RuntimeError: it does not compile, or nvdisasm is missing.
    """
    with tempfile.TemporaryDirectory() as name:
        log, cubin = run_compiler(SOURCES, spec, Path(name))
        loops = _loops(cubin)
        shared = constants(cubin.read_bytes())[5]
        plain = _plain(spec, Path(name))
    reports = {}
    for kernel, usage in read_log(log).items():
        near, far = loops[kernel]
        if near is None and kernel == spec.conversion:
            if usage.spills:
                raise RuntimeError(f"{kernel}: {usage.spills} bytes of spills")
            continue
        if near is None or far is None:
            raise RuntimeError(f"{kernel}: no loops over near and far tiles to be found in what nvcc made")
        reports[kernel] = CudaReport(
            usage.registers, usage.spills, shared, usage.serialised, near, far, plain.get(kernel)
        )
    return reports


def read_log(log: str) -> dict[str, Usage]:
    """Return what ptxas -v printed, by kernel."""
    warnings = re.findall(r"\(C75\d\d\)[^\n]*", log)
    found = {}
    for kernel, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.S):
        registers = re.search(r"Used (\d+) registers", text)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if registers is None or spills is None:
            raise RuntimeError(f"{kernel}: ptxas named no registers or spills")
        serialised = sum(f"'{kernel}'" in warning for warning in warnings)
        found[kernel] = Usage(int(registers[1]), int(spills[1]) + int(spills[2]), serialised)
    return found


def run_compiler(sources: Path, spec: ModuleSpec, folder: Path) -> tuple[str, Path]:
    """Compile one module; return what ptxas printed, and the cubin."""
    cubin = folder / "module.cubin"
    command = [
        str(nvcc()), *NVCC_FLAGS, "-Xptxas=-v", *spec.definitions, "-o", str(cubin), str(sources / spec.source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {sources}:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr, cubin


def _plain(spec: ModuleSpec, folder: Path) -> dict[str, Counts]:
    changed = folder / "plain"
    shutil.copytree(SOURCES, changed)
    file, choice, far_only = PLAIN[spec.which]
    consumer = changed / file
    text = consumer.read_text(encoding="utf-8")
    if choice not in text:
        raise RuntimeError(f"{file} no longer chooses between near and far tiles as tools/offline/cuda.py expects")
    consumer.write_text(text.replace(choice, far_only), encoding="utf-8")
    _, cubin = run_compiler(changed, spec, folder)
    return {kernel: loops[0] for kernel, loops in _loops(cubin).items() if loops[0] is not None}


def _loops(cubin: Path) -> dict[str, tuple[Counts | None, Counts | None]]:
    """Return the shortest passes of the near and far loops by kernel; with one loop only it comes first."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("nvdisasm is neither on the PATH nor in an installed Triton")
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\n\s*\.section\s+\.text\.(\w+)", text)
    return {kernel: zones(read_sass(body), shortest=True) for kernel, body in zip(sections[1::2], sections[2::2])}


def full_tile(counts: Counts) -> int:
    """Return the instructions per warp for a tile of 128 x 128, four passes shared by two warpgroups."""
    return 2 * counts.instructions
