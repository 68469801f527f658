"""Which variants of the kernels are counted, and the records of each."""

from __future__ import annotations

from typing import NamedTuple

from offline import cuda as nvcc
from offline import variants as compiled
from ptx.drivers import cuda_modules

from counted import execution
from counted.bounds import Record
from counted.execution import Executed
from counted.figures import conflicts, figures_of
from deberta_kernels.impl.cuda import nvrtc
from deberta_kernels.impl.cuda.modules import HEAD_DIMS

__all__ = ["Unit", "cuda_units", "records_of", "release", "triton_units"]

# Each feature by itself; what two of them take together is close to the sum.
_FEATURES = ("bias", "bias+mask", "bias+pair", "bias+dropout", "none")
_CUDA_FEATURES = ("bias", "bias+mask", "bias+pair", "bias+dropout")


class Unit(NamedTuple):
    """What one process executes: a forward and, where there is one, a backward.

    Attributes:
        compiler: "triton", or one of `cuda_modules.compilers()`.
        chip: "sm_80", "sm_86", "sm_90" or "sm_90a".
        dtype: short name.
        head_dim: D.
        features: as in `offline.variants.Variant`.
    """

    compiler: str
    chip: str
    dtype: str
    head_dim: int
    features: str

    @property
    def title(self) -> str:
        """Return what it is, in words."""
        return f"{self.compiler} {self.chip} {self.dtype} D{self.head_dim} {self.features}"


def triton_units(*, oldest: bool) -> list[Unit]:
    """Return the variants of the Triton kernels; for the oldest supported Triton the main dtype and head size alone."""
    found = [Unit("triton", chip, "bf16", 64, features) for chip in ("sm_80", "sm_90") for features in _FEATURES]
    if not oldest:
        sizes = ("fp32", 64), ("bf16", 96), ("bf16", 128), ("bf16", 256)
        found += [Unit("triton", "sm_90", dtype, dim, "bias") for dtype, dim in sizes]
        found += [Unit("triton", "sm_86", "bf16", 64, "bias")]
    return found


def cuda_units() -> list[Unit]:
    """Return the variants of the CUDA kernels, by every compiler that is here.

    Raises:
        cuda_modules.NoCudaCompiler: there is none.
    """
    if not cuda_modules.compilers():
        raise cuda_modules.NoCudaCompiler("there is no nvcc, and no NVRTC; set NVCC, or pip install nvidia-cuda-nvrtc")
    return [
        Unit(compiler, "sm_90a", "bf16", dim, features)
        for compiler in cuda_modules.compilers()
        for dim in HEAD_DIMS["forward"]
        for features in (_CUDA_FEATURES if dim == 64 else _CUDA_FEATURES[:1])
    ]


def records_of(unit: Unit) -> list[Record]:
    """Execute a unit; return a record for each zone of each of its kernels."""
    dtype = compiled.DTYPES[unit.dtype]
    if unit.compiler == "triton":
        found = execution.of_triton(int(unit.chip.removeprefix("sm_")), unit.features, dtype, unit.head_dim)
        names = _triton_names(unit)
    else:
        grad = unit.head_dim in HEAD_DIMS["backward"]
        found = execution.of_cuda(unit.features, dtype, unit.head_dim, grad=grad, compiler=unit.compiler)
        names = {name: [name] for name in found}
    records = []
    for name, kernel in found.items():
        first, *again = name.split(" ")
        titles = names[first]
        number = int(again[0].strip("()")) if again else 1
        title = titles[number - 1] if number <= len(titles) else f"{titles[0]} ({number})"
        records += [_record(release(unit.compiler), unit.chip, title, kernel, zone) for zone in kernel.zones]
    return records


def _record(compiler: str, chip: str, name: str, kernel: Executed, zone: str) -> Record:
    figures = figures_of(kernel, zone)
    return Record(compiler, chip, name, zone, figures.values, figures.classes, tuple(conflicts(kernel, zone)))


def _triton_names(unit: Unit) -> dict[str, list[str]]:
    """Return what the bounds of the compiled kernels call each kernel of a variant, deterministic ones last."""
    found: dict[str, list[str]] = {}
    for direction in ("forward", "backward"):
        variant = compiled.Variant(unit.chip, direction, unit.dtype, unit.head_dim, unit.features)
        for launch in compiled.launches(variant):
            titles = found.setdefault(launch.kernel.__name__, [])
            titles.append(compiled.kernel_title(variant, launch))
    return found


def release(compiler: str) -> str:
    """Return the compiler of a unit with its version, as the bounds name it."""
    if compiler == "triton":
        import triton

        return "triton " + ".".join(triton.__version__.split(".")[:2])
    if compiler == "nvcc":
        return f"nvcc {nvcc.release()}"
    return "nvrtc " + ".".join(map(str, nvrtc.Compiler().version))
