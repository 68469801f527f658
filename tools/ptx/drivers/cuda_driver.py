"""The CUDA kernels over a device that is not here: the package's own launches, libcuda's functions, the PTX machine."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from deberta_kernels.impl import cuda
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.impl.cuda import driver, image
from ptx.drivers.cuda_modules import compile_module
from ptx.drivers.unwritten import new_memory_is_unwritten
from ptx.machine import Machine, Memory
from ptx.tensor_map import SWIZZLES, tensor_map

__all__ = ["Device", "installed", "memory_range"]

# CUtensorMapDataType of cuda.h: float16 and bfloat16.
_ELEMENT_BYTES = {6: 2, 9: 2}
_INVALID_VALUE = 1


class Device:
    """What is loaded, and how launches are to be run.

    Attributes:
        compiler, changes: see `compile_module`.
        seed: of the order of warps in the last launch; each launch takes the next one.
        late: warps that fall behind.
        machines: by the name of their kernel.
        memory: what the next launch may touch: tensors, and whether it writes them.
        calls: those of libcuda's functions, in words.
        failing: status by name of the functions that fail.
        capability: compute capability.
        devices: how many there are.
        contexts: how many are pushed.
    """

    def __init__(self, compiler: str | None = None, changes: tuple[tuple[str, str], ...] = ()) -> None:
        self.compiler, self.changes = compiler, changes
        self.seed, self.late = 0, tuple[int, ...]()
        self.machines: dict[str, Machine] = {}
        self.memory: list[tuple[torch.Tensor, bool]] = []
        self.error = b""
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.capability, self.devices, self.contexts = (9, 0), 1, 0
        self._ptx: list[str] = []
        self._kernels: list[str] = []

    def launch(self, name: str, blocks: int, arguments: int) -> None:
        """Launch a kernel whose arguments lie at an address."""
        machine = self.machines[name]
        self.seed += 1
        data = ctypes.string_at(arguments, machine.program.kernel.parameter_bytes)
        memory = [memory_range(x, writes) for x, writes in self.memory]
        machine.launch((blocks,), data, memory, seed=self.seed, late=self.late)

    def library(self) -> Any:
        """Return what ctypes would: functions that return a status."""
        return mock.Mock(spec_set=list(_FUNCTIONS), **{name: _Function(self, name) for name in _FUNCTIONS})

    def load(self, module: bytes) -> int:
        """Keep a module; return its handle."""
        self._ptx.append(module[module.index(_PTX) + len(_PTX) :].decode())
        return len(self._ptx)

    def function(self, module: int, name: str, threads: int) -> int:
        """Return the handle of a kernel, which is read at its first use."""
        if name not in self.machines:
            self.machines[name] = Machine(self._ptx[module - 1], name, threads=threads)
        self._kernels.append(name)
        return len(self._kernels)

    def named(self, function: int) -> str:
        """Return the name of a kernel by its handle."""
        return self._kernels[function - 1]


class _Function:
    """One function of libcuda; the package gives it types."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, device: Device, name: str) -> None:
        self._device, self._name = device, name

    def __call__(self, *arguments: Any) -> int:
        self._device.calls.append(self._name)
        if status := self._device.failing.get(self._name):
            self._device.error = b"made to fail"
            return status
        try:
            return _FUNCTIONS[self._name](self._device, *arguments) or 0
        except ValueError as error:
            self._device.error = str(error).encode()
            return _INVALID_VALUE


def _set(target: Any, value: Any) -> None:
    """Store through a pointer made by ctypes.byref."""
    target._obj.value = value


def _attribute(device: Device, target: Any, attribute: int, number: int) -> None:
    _set(target, device.capability[attribute - 75])


def _load(device: Device, target: Any, module: bytes) -> None:
    if not device.contexts:
        raise ValueError("no context is current")
    _set(target, device.load(module))


def _push(device: Device, context: Any) -> None:
    device.contexts += 1


def _pop(device: Device, target: Any) -> None:
    device.contexts -= 1


def _function(device: Device, target: Any, module: Any, name: bytes) -> None:
    device.calls[-1] += f" {name.decode()}"
    _set(target, device.function(module.value, name.decode(), _THREADS[b"_dq_" in name]))


def _encode(
    device: Device, target: Any, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any,
    interleave: int, swizzle: int, promotion: int, fill: int,
) -> None:  # fmt: skip
    device.calls[-1] += f" {kind}, {rank} dimensions, {swizzle} {promotion} {fill}"
    if interleave or fill or any(step != 1 for step in steps):
        raise ValueError("a tensor map with interleaving, another filling than zeros or steps")
    data = tensor_map(address, _ELEMENT_BYTES[kind], tuple(sizes), tuple(strides), tuple(box), SWIZZLES[swizzle])
    ctypes.memmove(ctypes.addressof(target._obj), data, len(data))


def _launch(
    device: Device, function: Any, x: int, y: int, z: int, threads: int, threads_y: int, threads_z: int, shared: int,
    stream: int, parameters: Any, extra: Any,
) -> None:  # fmt: skip
    grid, block = f"grid {x} {y} {z}", f"block {threads} {threads_y} {threads_z}"
    device.calls[-1] += f" {grid}, {block}, shared {shared}, stream {stream}"
    if not device.contexts or y * z * threads_y * threads_z != 1 or extra is not None:
        raise ValueError("a launch without a context, of more than one dimension, or with extra parameters")
    machine = device.machines[device.named(function.value)]
    machine.threads, machine.shared_bytes = threads, machine.program.kernel.shared_bytes + shared
    device.launch(machine.name, x, parameters[0])


def _error(device: Device, status: int, text: Any) -> None:
    text._obj.value = device.error


def _nothing(device: Device, *arguments: Any) -> None:
    return None


_FUNCTIONS: dict[str, Callable[..., int | None]] = {
    "cuInit": _nothing,
    "cuDriverGetVersion": lambda device, target: _set(target, 13000),
    "cuGetErrorString": _error,
    "cuDeviceGetCount": lambda device, target: _set(target, device.devices),
    "cuDeviceGet": lambda device, target, number: _set(target, number),
    "cuDeviceGetAttribute": _attribute,
    "cuDevicePrimaryCtxRetain": lambda device, target, number: _set(target, 1),
    "cuCtxPushCurrent_v2": _push,
    "cuCtxPopCurrent_v2": _pop,
    "cuModuleLoadData": _load,
    "cuModuleGetFunction": _function,
    "cuFuncSetAttribute": _nothing,
    "cuTensorMapEncodeTiled": _encode,
    "cuLaunchKernel": _launch,
}
# Of a block, until a launch says so itself: of the attention kernels, and of the one that converts dq.
_THREADS = {False: 384, True: 128}
_PTX = b"\n// PTX\n"


def memory_range(x: torch.Tensor, writable: bool) -> Memory:
    """Return the memory from the first element of x to behind the last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = (last + 1) * x.element_size() if x.numel() else 0
    return Memory(x.data_ptr(), size, min(x.element_size(), 4), writable)


def module_file(ptx: str) -> bytes:
    """Return an ELF file that holds what the module says of itself where nvcc puts it, and behind it the PTX."""
    start = ptx.index("_info[28] = {") + len("_info[28] = {")
    values = bytes(int(x) for x in ptx[start : ptx.index("}", start)].split(",")).ljust(28, b"\0")
    names = b"\0.shstrtab\0.nv.constant3\0"
    first = 64 + len(names)
    headers = [(0, 0, 0, 0, 0, 0), (1, 3, 0, 0, 64, len(names)), (11, 1, 0, 0, first, len(values))]
    table = b"".join(struct.pack("<IIQQQQ", *header).ljust(64, b"\0") for header in headers)
    head = b"\x7fELF".ljust(40, b"\0") + struct.pack("<Q", first + len(values))
    head = head.ljust(58, b"\0") + struct.pack("<HHH", 64, len(headers), 1)
    return head + names + values + table + _PTX + ptx.encode()


@contextmanager
def installed(device: Device) -> Iterator[Device]:
    """Let the package's backend "cuda" run on the machine, on tensors of the CPU."""
    with mock.patch.object(ctypes, "CDLL", return_value=device.library()):
        opened = driver.Driver()
    launch = driver.Module.launch

    def allowed(self: Any, name: str, arguments: Any, blocks: int, stream: int) -> None:
        device.memory = arguments.memory
        launch(self, name, arguments, blocks, stream)

    def images(which: str, dtype: torch.dtype, head_dim: int) -> Iterator[bytes]:
        yield module_file(compile_module(image.spec_of(which, dtype, head_dim), device.compiler, device.changes))

    with (
        mock.patch.object(driver.Module, "launch", allowed),
        mock.patch.object(driver, "_opened", return_value=(opened, None)),
        mock.patch.object(cuda, "_loaded", Attempts()),
        mock.patch.object(cuda, "device_refusal", return_value=None),
        mock.patch.object(cuda, "_ordinal", return_value=0),
        mock.patch.object(cuda, "_stream", return_value=0),
        mock.patch.object(image, "images", images),
        new_memory_is_unwritten(),
    ):
        yield device
