"""The NVIDIA driver, libcuda, through its C interface: devices, modules, tensor maps, launches."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

import torch

from deberta_kernels.impl.attempts import Attempts, FailedError
from deberta_kernels.impl.cuda.arguments import Box, Call, TensorMap

__all__ = ["LIBRARY", "Driver", "DriverError", "Module", "driver", "unavailable"]

LIBRARY = "libcuda.so.1"

# Function: types of its arguments; all return a status.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuTensorMapEncodeTiled": (
        c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32),
        c_int, c_int, c_int, c_int,
    ),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}  # fmt: skip

# cuda.h: CUdevice_attribute, CUfunction_attribute, CUtensorMapDataType and the other settings of tensor maps.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_MAX_DYNAMIC_SHARED = 8
_ELEMENTS = {torch.float16: 6, torch.bfloat16: 9}
_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, _FILL_ZEROS = 0, 3, 3, 0

# Statuses of cuda.h: out of memory; the device used by somebody else; the operating system (304); the system or the
# multi-process service not ready; and what a stream refuses while it is being captured.
_PASSING = (2, 46, 304, 802, *range(805, 810), *range(900, 910))


class DriverError(RuntimeError):
    """The driver refused a call, or there is none.

    Attributes:
        passing: the same call may succeed later.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.passing = status in _PASSING


class Driver:
    """The open driver library.

    Attributes:
        devices: how many it shows; torch counts them alike.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        """Open and initialise it.

        Raises:
            DriverError: it is not there, too old, or shows no device.
        """
        try:
            self._handle = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"the NVIDIA driver is not there ({error})") from error
        for name, types in _SIGNATURES.items():
            try:
                function = getattr(self._handle, name)
            except AttributeError as error:
                raise DriverError(f"the NVIDIA driver is too old: {library} has no {name}") from error
            function.argtypes, function.restype = types, c_int
        self.call("cuInit", 0)
        self.devices = self._integer("cuDeviceGetCount")
        if self.devices == 0:
            raise DriverError("the NVIDIA driver shows no device")
        self._contexts: dict[int, c_void_p] = {}
        self._lock = threading.Lock()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            DriverError: it returned an error.
        """
        status = getattr(self._handle, name)(*arguments)
        if status:
            text = c_char_p()
            self._handle.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown error').decode(errors='replace')} ({status})", status)

    def _integer(self, name: str, *arguments: Any) -> int:
        found = c_int()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def version(self) -> tuple[int, int]:
        """Return the newest CUDA that the driver supports, (major, minor)."""
        number = self._integer("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def capability(self, device: int) -> tuple[int, int]:
        """Return the compute capability of a device, (major, minor)."""
        handle = self._integer("cuDeviceGet", device)
        return (
            self._integer("cuDeviceGetAttribute", _CAPABILITY_MAJOR, handle),
            self._integer("cuDeviceGetAttribute", _CAPABILITY_MINOR, handle),
        )

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Make the context that torch uses on this device the current one of this thread; a new thread has none."""
        with self._lock:
            if device not in self._contexts:
                context = c_void_p()
                self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._integer("cuDeviceGet", device))
                self._contexts[device] = context
        self.call("cuCtxPushCurrent_v2", self._contexts[device])
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def encode(self, target: TensorMap, dtype: torch.dtype, box: Box) -> None:
        """Fill a tensor map.

        Args:
            target: on a 64-byte boundary; will be written.
            dtype: float16 or bfloat16.
            box: what the map describes; the innermost dimension is contiguous.
        """
        rank = len(box.sizes)
        if box.strides[0] != 2:
            raise ValueError(f"the innermost dimension must be contiguous, 2 bytes a step, got {box.strides[0]}.")
        self.call(
            "cuTensorMapEncodeTiled", ctypes.byref(target), _ELEMENTS[dtype], rank, box.address,
            (c_uint64 * rank)(*box.sizes), (c_uint64 * (rank - 1))(*box.strides[1:]), (c_uint32 * rank)(*box.box),
            (c_uint32 * rank)(*[1] * rank), _NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, _FILL_ZEROS,
        )  # fmt: skip


class Module:
    """One compiled module on one device, and its kernels."""

    def __init__(self, driver: Driver, device: int, cubin: bytes, kernels: dict[str, tuple[int, int]]) -> None:
        """Load it.

        Args:
            driver: the open driver.
            device: number of the device.
            cubin: the compiled module.
            kernels: its kernels by name: threads of a block, and bytes of dynamic shared memory.

        Raises:
            DriverError: the driver cannot load it, or a kernel is missing.
        """
        self._driver, self._device, self._kernels = driver, device, kernels
        self._functions: dict[str, c_void_p] = {}
        handle = c_void_p()
        with driver.on(device):
            driver.call("cuModuleLoadData", ctypes.byref(handle), cubin)
            for name, (_, shared_bytes) in kernels.items():
                function = c_void_p()
                driver.call("cuModuleGetFunction", ctypes.byref(function), handle, name.encode())
                driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
                self._functions[name] = function

    def launch(self, name: str, arguments: Call, blocks: int, stream: int) -> None:
        """Launch a kernel; returns before it has run.

        Args:
            name: of the kernel.
            arguments: copied by the driver.
            blocks: of the grid.
            stream: address of the CUDA stream, 0 for the default one.
        """
        if blocks == 0:
            return
        threads, shared_bytes = self._kernels[name]
        pointers = (c_void_p * 1)(ctypes.addressof(arguments.params))
        with self._driver.on(self._device):
            self._driver.call(
                "cuLaunchKernel", self._functions[name], blocks, 1, 1, threads, 1, 1, shared_bytes, stream, pointers,
                None,
            )  # fmt: skip


_found: Attempts[None, Driver] = Attempts()


def _opened() -> tuple[Driver | None, str | None]:
    try:
        return _found.get(None, Driver), None
    except FailedError as error:
        return None, str(error)


def driver() -> Driver:
    """Return the driver, opened at the first use.

    Raises:
        DriverError: there is none that can be used.
    """
    found, reason = _opened()
    if found is None:
        raise DriverError(str(reason))
    return found


def unavailable() -> str | None:
    """Return why there is no driver, or None when there is one."""
    return _opened()[1]
