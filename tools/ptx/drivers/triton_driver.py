"""Triton over a device that is not here: its own compiler, binder and cache, with launches on the PTX machine."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel

from deberta_kernels.impl import triton as backend
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.impl.triton import backward_plan, execute, plan, tuning
from ptx.drivers.unwritten import new_memory_is_unwritten
from ptx.machine import Machine, Memory

__all__ = ["Device", "installed", "laid_out", "memory_of", "standing_in"]

# Bytes of shared memory that a block may have, by compute capability: Triton compares before it loads a kernel.
_SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
_NUMBERS = itertools.count()


class Device:
    """What has been compiled, and how it is to be run.

    Attributes:
        architecture: 80, 86 or 90.
        seed: of the order of warps in the last launch; each launch takes the next one.
        late: warps that fall behind.
        machines: by the key that Triton gives a compiled kernel.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.seed, self.late = 0, tuple[int, ...]()
        # Triton keeps what it has compiled by the number of the device.
        self.number = next(_NUMBERS)
        self.machines: dict[str, Machine] = {}
        self._compiled: dict[str, tuple[str, int, int]] = {}

    def keep(self, kernel: CompiledKernel) -> None:
        """Keep a compiled kernel, to be read when it is launched."""
        self._compiled[kernel.metadata.hash] = kernel.asm["ptx"], kernel.metadata.shared, kernel.metadata.num_warps

    def launch(self, key: str, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        """Launch a compiled kernel."""
        if key not in self.machines:
            text, shared, warps = self._compiled[key]
            self.machines[key] = Machine(text, shared_bytes=shared, threads=32 * warps)
        machine = self.machines[key]
        self.seed += 1
        machine.launch(grid, laid_out(machine, arguments), memory_of(arguments), seed=self.seed, late=self.late)


def memory_of(arguments: list[Any]) -> list[Memory]:
    """Return the memory of the tensors among the arguments; which are written is not known."""
    storages = {}
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.numel():
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = Memory(storage.data_ptr(), storage.nbytes(), min(x.element_size(), 4))
    return list(storages.values())


def laid_out(machine: Machine, arguments: list[Any]) -> bytes:
    """Return the arguments as the kernel has them; Triton adds scratch memory, which no kernel here uses."""
    kernel = machine.program.kernel
    data = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(kernel.parameters, [*arguments, 0, 0]):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        elif isinstance(value, float):
            value = struct.unpack("<I", struct.pack("<f", value))[0]
        bits = int(value) & ((1 << 8 * parameter.size) - 1)
        data[parameter.offset : parameter.offset + parameter.size] = bits.to_bytes(parameter.size, "little")
    return bytes(data)


class _Utils:
    """What Triton asks a device and its loader."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def get_device_properties(self, number: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self._device.architecture], "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, number: int) -> tuple[Any, ...]:
        return name, name, 128, 0, 1024  # module, function, registers, spills, most threads


class _Driver(DriverBase):  # type: ignore[misc]
    """A device in the place of the one that Triton would find."""

    def __init__(self, device: Device) -> None:
        self.device, self.utils = device, _Utils(device)
        self.launcher_cls = self._launcher

    def _launcher(self, source: Any, metadata: Any) -> Any:
        kinds, key = list(source.signature.values()), metadata.hash

        def launch(
            x: int, y: int, z: int, stream: int, function: str, packed: Any, meta: Any, enter: Any, leave: Any,
            *arguments: Any,
        ) -> None:  # fmt: skip
            given = [value for kind, value in zip(kinds, arguments, strict=True) if kind != "constexpr"]
            if enter is not None:
                enter(meta)
            self.device.launch(key, (x, y, z), given)
            if leave is not None:
                leave(meta)

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.device.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device.architecture, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return None


@contextmanager
def installed(device: Device) -> Iterator[Device]:
    """Let Triton, and with it the package's backend "triton", run on the machine, on tensors of the CPU."""
    with standing_in(device), new_memory_is_unwritten():
        yield device


@contextmanager
def standing_in(device: Device) -> Iterator[Device]:
    """Let Triton, and with it the package's backend "triton", launch on a device, on tensors of the CPU."""
    compiled = CompiledKernel.__init__

    def remembered(self: Any, *arguments: Any) -> None:
        compiled(self, *arguments)
        device.keep(self)

    # Functions, for mock objects would take part of the host time that is measured.
    def accepted(on: torch.device, dtype: torch.dtype) -> None:
        return None

    def named(on: torch.device) -> str:
        return f"sm_{device.architecture}"

    def all_rows(rows: int, on: torch.device) -> int:
        return rows

    active = triton.runtime.driver._active
    with (
        mock.patch.object(CompiledKernel, "__init__", remembered),
        mock.patch.object(backend, "_device_refusal", accepted),
        mock.patch.object(tuning, "device_key", named),
        # As on a GPU; on the CPU these say how much the interpreter likes at once.
        mock.patch.object(plan, "rows_of_program", all_rows),
        mock.patch.object(backward_plan, "rows_of_program", all_rows),
        mock.patch.object(execute, "_compiled", Attempts()),
    ):
        triton.runtime.driver.set_active(_Driver(device))
        try:
            yield device
        finally:
            triton.runtime.driver._active = active
