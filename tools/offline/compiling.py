"""One launch of a Triton kernel, compiled for a device that is not here."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from offline.chips import Chip
from offline.counting import Report, count, matrix_name, zones
from offline.fences import unfenced
from offline.listing import read_amdgcn, read_sass

# Triton 3.9 asks for a decision about contracting a * b + c, which changes its default later. Contraction is on here.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deberta_kernels.dtypes import SHORT_NAMES

__all__ = ["compile_launch", "signature"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    **SHORT_NAMES,
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def signature(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return types, constants and alignments of the arguments, as Triton's launcher would specialise them.

    Args:
        kernel: the `triton.jit` function.
        arguments: name -> value of every parameter; tensors may be on the meta device.

    Returns:
        type by name ("constexpr" for constants), the constants by name, and Triton's attributes by position.

    Raises:
        TypeError: an argument is of a kind that no kernel takes, or one is missing.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name not in arguments:
            raise TypeError(f"the launch of {kernel.__name__} lacks its argument {name}.")
        value = arguments[name]
        constant, type_name, aligned = _specialised(parameter, value)
        types[name] = "constexpr" if constant else type_name
        if constant:
            constants[name] = value
        elif aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _specialised(parameter: Any, value: Any) -> tuple[bool, str, bool]:
    """Return whether an argument is a constant, its type otherwise, and whether it is a multiple of 16."""
    free = parameter.do_not_specialize
    if parameter.is_constexpr or value is None:
        return True, "", False
    if isinstance(value, torch.Tensor):
        # torch allocates at 512 bytes; a view in the middle of a row is a variant of its own, not looked at here.
        return False, f"*{_TYPES[value.dtype]}", not (free or parameter.do_not_specialize_on_alignment)
    if isinstance(value, bool):
        return False, "i1", False
    if isinstance(value, int):
        if value == 1 and not free:
            return True, "", False
        aligned = value % 16 == 0 and not (free or parameter.do_not_specialize_on_alignment)
        return False, "i32" if -(2**31) <= value < 2**31 else "i64", aligned
    if isinstance(value, float):
        return False, "fp32", False
    raise TypeError(f"argument {parameter.name} is a {type(value).__name__}; kernels take tensors and numbers.")


def compile_launch(kernel: Any, arguments: Mapping[str, Any], chip: Chip, options: Mapping[str, Any]) -> Report:
    """Compile one variant of a kernel and count its instructions.

    Args:
        kernel: the `triton.jit` function.
        arguments: name -> value of every parameter, constants included.
        chip: the device.
        options: num_warps, num_stages and the like.
    """
    types, constants, attributes = signature(kernel, arguments)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget(chip.backend, chip.architecture, chip.lanes), options=dict(options)
    )
    read = _read_nvidia if chip.backend == "cuda" else _read_amd
    listing, registers, stack = read(compiled.asm)
    near, far = zones(listing)
    opcodes = listing.opcodes()
    shared = int(compiled.metadata.shared)
    lacking = unfenced(compiled.asm["ptx"]) if chip.backend == "cuda" else 0
    return Report(registers, stack, shared, matrix_name(opcodes), count(opcodes), near, far, lacking)


def _read_nvidia(binaries: Mapping[str, Any]) -> tuple[Any, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binaries["cubin"])
        usage = _output(_TOOLS / "cuobjdump", "-res-usage", path)
        listing = read_sass(_output(_TOOLS / "nvdisasm", "-c", path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    return listing, int(found[1]), int(found[2])


def _read_amd(binaries: Mapping[str, Any]) -> tuple[Any, int, int]:
    text = binaries["amdgcn"]
    found = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    }
    return read_amdgcn(text), found["vgpr_count"], found["private_segment_fixed_size"]


def _output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout
