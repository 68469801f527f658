"""The native CPU library, found and opened. Its sources are in csrc/cpu, the build in setup.py."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

try:
    import torch
except (ImportError, OSError):  # `info` describes an installation without it, or with a broken one, as well
    torch = None  # type: ignore[assignment]

from deberta_kernels import env
from deberta_kernels.native import absence, library_file
from deberta_kernels.native.params import ABI_VERSION, AttentionParams, DropoutParams, LinearParams, layouts

__all__ = [
    "ABI_VERSION",
    "DTYPES",
    "AttentionParams",
    "DropoutParams",
    "Library",
    "LinearParams",
    "gemm_rate",
    "library_status",
    "need",
    "opened",
    "status_without",
    "unavailable",
    "use_isa",
]

# DataType of csrc/cpu/params.h
DTYPES = {} if torch is None else {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Status of csrc/cpu/params.h: the error, and what it says.
_STATUS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "out of memory"),
    2: (RuntimeError, "library and package do not match"),
    3: (RuntimeError, "not in this instruction set"),
    4: (ValueError, "prepared tables of another size"),
}
_TAKES = {
    "dk_cpu_forward": AttentionParams,
    "dk_cpu_backward": AttentionParams,
    "dk_cpu_prepared_bytes": AttentionParams,
    "dk_cpu_prepare": AttentionParams,
    "dk_cpu_linear": LinearParams,
    "dk_cpu_dropout": DropoutParams,
}


class Library:
    """The open library and the instruction-set variant in use."""

    def __init__(self, path: str) -> None:
        self.path = path
        handle = ctypes.CDLL(path)
        for name in ("dk_abi_version", "dk_variant_count"):
            getattr(handle, name).restype = ctypes.c_int64
        if handle.dk_abi_version() != ABI_VERSION:
            raise OSError("it was built from another version of the package")
        handle.dk_layouts.restype = ctypes.c_char_p
        if handle.dk_layouts() != layouts().encode():
            raise OSError("its structs are not those of the package")
        handle.dk_variant_name.restype = ctypes.c_char_p
        handle.dk_variant_name.argtypes = handle.dk_variant_runs.argtypes = [ctypes.c_int64]
        for name, params in _TAKES.items():
            getattr(handle, name).argtypes = [ctypes.POINTER(params), ctypes.c_int64]
        handle.dk_cpu_prepared_bytes.restype = ctypes.c_int64
        handle.dk_cpu_prepare.argtypes = [*handle.dk_cpu_prepare.argtypes, ctypes.c_void_p]
        handle.dk_checksum_key_bytes.restype = ctypes.c_int64
        handle.dk_cpu_checksum.restype = None
        handle.dk_cpu_checksum.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
        ]  # fmt: skip
        handle.dk_cpu_gemm_rate.restype = ctypes.c_double
        handle.dk_cpu_gemm_rate.argtypes = [ctypes.c_int64] * 3
        self.team_runner = _team_runner()
        handle.dk_set_team_runner.argtypes = [ctypes.c_void_p]
        handle.dk_set_team_runner(self.team_runner)
        self.handle = handle
        self.forked = False  # it was opened by the parent of this process
        self.checksum_key = _aligned(os.urandom(handle.dk_checksum_key_bytes()))
        compiled = [handle.dk_variant_name(i).decode() for i in range(handle.dk_variant_count())]
        self.compiled = compiled
        self.variants = {name: i for i, name in enumerate(compiled) if handle.dk_variant_runs(i)}
        self.isa = env.cpu_isa() or next(iter(self.variants))
        if self.isa not in self.variants:
            usable = ", ".join(self.variants)
            asked = f"{env.CPU_ISA}={self.isa}"
            raise ValueError(f"{asked} is not among what it has for this processor ({usable}); unset it")

    def threads(self) -> int:
        """Return how many threads may compute: one in a forked child, where OpenMP's own threads do not exist.

        And one beside a PyTorch without OpenMP.
        """
        return 1 if self.forked or self.team_runner is None else torch.get_num_threads()

    def checksum(self, tensor: torch.Tensor) -> bytes:
        """Return 16 bytes that follow the content of a contiguous CPU tensor, under a key of this process.

        Two contents share them with a probability below 2^-63, however they were chosen; see csrc/cpu/checksum.h.
        """
        result = (ctypes.c_uint64 * 2)()
        key, variant = self.checksum_key, self.variants[self.isa]
        self.handle.dk_cpu_checksum(tensor.data_ptr(), tensor.nbytes, key, result, variant)
        return bytes(result)

    def prepared_bytes(self, params: AttentionParams) -> int:
        """Return how large `prepared` is for the tables of a call, in bytes."""
        size: int = self.handle.dk_cpu_prepared_bytes(params, self.variants[self.isa])
        return size

    def call(self, name: str, params: ctypes.Structure, *more: Any) -> None:
        """Call an exported function.

        Raises:
            MemoryError: there is not enough for its scratch.
            ValueError: prepared tables have not the size that it would read.
            RuntimeError: it cannot run, whatever the tensors are.
        """
        status = getattr(self.handle, name)(params, self.variants[self.isa], *more)
        if status:
            error, reason = _STATUS.get(status, (RuntimeError, str(status)))
            raise error(f"{name}: {reason}")


def _team_runner() -> int | None:
    """Return the address of the OpenMP function by which PyTorch's kernels start threads; None where it has none."""
    try:
        # In the libraries that it was linked with, whatever they are called.
        found = ctypes.CDLL(str(torch._C.__file__)).GOMP_parallel
        # Another runtime that was loaded before, for all to see, as by LD_PRELOAD: it answers PyTorch as well.
        with suppress(AttributeError):
            found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError):
        return None
    return ctypes.cast(found, ctypes.c_void_p).value


def _aligned(content: bytes) -> ctypes.Array[ctypes.c_char]:
    """Return the content in memory that starts at a multiple of 64 bytes, so that no vector of it is two loads."""
    memory = ctypes.create_string_buffer(len(content) + 64)
    array = (ctypes.c_char * len(content)).from_buffer(memory, -ctypes.addressof(memory) % 64)
    array.raw = content
    return array


_lock = threading.Lock()


def _start_child() -> None:
    """Forget the threads that a forked child does not have: one may have held the lock, others computed."""
    global _lock
    _lock = threading.Lock()
    if _library is not None:
        _library.forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_child)

_library: Library | None = None
_problem: str | None = None  # why there is no library


def opened() -> Library | None:
    """Open the library at the first use; remember the reason when that fails."""
    global _library, _problem
    if _library is not None or _problem is not None:
        return _library
    with _lock:
        if _library is None and _problem is None:
            path = str(absence.INSTALLED)
            try:
                path = env.library_path() or path
                _problem = _damage(path)
                if _problem is None:
                    _library = Library(path)
            except ValueError as error:  # of an environment variable: another library would not do either
                _problem = f"the native library {path} cannot be used: {error}"
            except (OSError, AttributeError) as error:
                _problem = absence.unusable(path, str(error))
    return _library


def _damage(path: str) -> str | None:
    """Return why the library cannot be opened, and what to do about it; None where nothing speaks against it."""
    if not os.path.lexists(path):
        return absence.not_built(path)
    found = library_file.damage(path)
    return None if found is None else absence.unusable(path, found)


def unavailable() -> str | None:
    """Return why there is no library, or None when there is one."""
    return None if (_library or opened()) is not None else _problem


def need() -> Library:
    """Return the library.

    Raises:
        RuntimeError: there is none.
    """
    library = _library or opened()
    if library is None:
        raise RuntimeError(_problem)
    return library


def status_without(reason: str | None) -> dict[str, Any]:
    """Return what `library_status` says where there is no library, for this reason."""
    nothing: list[str] = []
    return {
        "loaded": False, "path": None, "reason": reason, "isa": None, "variants": nothing, "compiled": nothing,
        "slower": "",
    }  # fmt: skip


def library_status() -> dict[str, Any]:
    """Describe the native library.

    Returns:
        loaded: bool; path: str or None; reason: why it is not loaded, or None; isa: variant in use, or None;
        variants: names that run on this processor, fastest first; compiled: all names in the library; slower: why a
        faster variant is not in use, or "".
    """
    library = opened()
    if library is None:
        return status_without(_problem)
    return {
        "loaded": True, "path": library.path, "reason": None, "isa": library.isa, "variants": list(library.variants),
        "compiled": library.compiled, "slower": absence.slower_variant(library.isa, library.compiled),
    }  # fmt: skip


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Run another instruction-set variant inside a `with` block; for tests and benchmarks, not thread-safe.

    Tables prepared outside the block do not fit inside it.

    Raises:
        ValueError: the library has no such variant for this processor.
    """
    library = need()
    if isa not in library.variants:
        raise ValueError(f"isa must be one of {', '.join(library.variants)}, got {isa!r}")
    before = library.isa
    library.isa = isa
    try:
        yield
    finally:
        library.isa = before


def gemm_rate(dtype: torch.dtype | None = None) -> float:
    """Measure the GFLOP/s of one core's micro-kernel on data in the first-level cache: the kernels' ceiling.

    Args:
        dtype: float32, or None for it, or bfloat16.
    """
    library = need()
    repeats = 20_000  # some milliseconds, of which reading the clock is nothing
    code, variant = DTYPES[dtype or torch.float32], library.variants[library.isa]
    rate: float = library.handle.dk_cpu_gemm_rate(code, repeats, variant)
    return rate
