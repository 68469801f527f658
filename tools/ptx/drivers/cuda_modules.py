"""The PTX of csrc/cuda, as nvcc makes it, or NVRTC from its wheel where there is no nvcc."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

from deberta_kernels.impl.cuda import nvrtc
from deberta_kernels.impl.cuda.modules import NVCC_FLAGS, NVRTC_FLAGS, ModuleSpec
from ptx.build import made_once

__all__ = ["SOURCES", "NoCudaCompiler", "compile_module", "compilers"]

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"


class NoCudaCompiler(RuntimeError):
    """There is no compiler of CUDA C++ on this machine."""


class _Nvrtc(nvrtc.Compiler):
    """NVRTC, stopped before its assembler."""

    def _text(self, program: c_void_p, what: str) -> bytes:
        if what != "CUBIN":
            return super()._text(program, what)
        size = c_size_t()
        self._call("nvrtcGetPTXSize", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call("nvrtcGetPTX", program, buffer)
        return buffer.value


def _nvcc() -> str | None:
    return shutil.which(os.environ.get("NVCC", "nvcc"))


@lru_cache(maxsize=1)
def compilers() -> tuple[str, ...]:
    """Return which of "nvcc" and "nvrtc" are here, the one to use first."""
    found = ["nvcc"] if _nvcc() else []
    try:
        nvrtc.Compiler()
    except nvrtc.NvrtcError:
        return tuple(found)
    return (*found, "nvrtc")


@lru_cache(maxsize=16)
def compile_module(spec: ModuleSpec, compiler: str | None = None, changes: tuple[tuple[str, str], ...] = ()) -> str:
    """Return the PTX of a module for sm_90a, compiled before unless these very sources have been.

    Args:
        spec: which module.
        compiler: one of `compilers()`; None: the first.
        changes: pieces of the sources to replace, (old, new); each old piece must be there.

    Raises:
        NoCudaCompiler: there is none.
        RuntimeError: it fails.
    """
    if not compilers():
        raise NoCudaCompiler("there is no nvcc, and no NVRTC; set NVCC, or pip install nvidia-cuda-nvrtc")
    compiler = compiler or compilers()[0]
    sources = _changed({path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.*"))}, changes)
    digest = hashlib.sha256(repr((compiler, _nvcc(), spec, NVCC_FLAGS, NVRTC_FLAGS, sources)).encode()).hexdigest()[:16]

    def compile_to(target: Path) -> None:
        if compiler == "nvcc":
            _run_nvcc(spec, sources, target)
            return
        options = tuple(flag.replace("=sm_", "=compute_") for flag in NVRTC_FLAGS)
        target.write_bytes(_Nvrtc().cubin(sources, spec.source, (*options, "-lineinfo", *spec.definitions)))

    return made_once(f"{spec.name}-{compiler}-{digest}.ptx", compile_to).read_text(encoding="utf-8")


def _changed(sources: dict[str, str], changes: tuple[tuple[str, str], ...]) -> dict[str, str]:
    for old, new in changes:
        if not any(old in text for text in sources.values()):
            raise ValueError(f"{old!r} is not in the sources")
        sources = {name: text.replace(old, new) for name, text in sources.items()}
    return sources


def _run_nvcc(spec: ModuleSpec, sources: dict[str, str], target: Path) -> None:
    flags = [flag.replace("code=sm_", "code=compute_") for flag in NVCC_FLAGS if flag != "-cubin"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        command = [str(_nvcc()), *flags, "-ptx", "-lineinfo", *spec.definitions, "-o", str(target)]
        command.append(str(Path(folder) / spec.source))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc fails on {spec.source}:\n{done.stderr[-4000:]}")
