"""The device, its two ceilings, and the time of work on it."""

from __future__ import annotations

import gc
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.cases import asked
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import Item
from benchmarks.harness.machine import package_versions

__all__ = [
    "Clock",
    "captured",
    "ceilings",
    "describe",
    "folder",
    "free_memory",
    "healthy",
    "peak_memory",
    "synchronize",
]

# Distributions whose version can move a number.
PACKAGES = ("torch", "triton", "transformers", "numpy", "flashdeberta", "disentangled-flash")
# The longest wait put before timed work, in seconds: while the device waits, the host issues all of it.
LONGEST_WAIT = 0.05
CYCLES_PER_SECOND = 2.0e9


def items(plan: Plan) -> list[Item]:
    """Return the description of the device and its rates."""
    about = Item("device", lambda: {**describe(plan.device), "asked": list(asked(plan))})
    return [about, Item("rates", lambda: ceilings(plan.device))]


def describe(device: str) -> dict[str, Any]:
    """Return what identifies the device and the software."""
    versions = {"python": platform.python_version(), **package_versions(PACKAGES), "torch": torch.__version__}
    found: dict[str, Any] = {"versions": versions, "system": f"{platform.system()} {platform.release()}"}
    if device == "cpu":
        return {**found, "name": f"cpu {platform.machine()}", "capability": "", "memory_gib": 0.0}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "smi": _smi(),
    }


def _smi() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu", "utilization.gpu")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in done.stdout.split(",")), strict=False))


def folder(name: str) -> str:
    """Return the name of the folder of results for a device of this name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """Give back what torch's allocator holds for tensors that are gone."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a CUDA graph of a call, warmed up, and the result that its replays fill."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def healthy(device: str) -> bool:
    """Return whether the device still computes; after an illegal access it never does again in one process."""
    try:
        value = torch.ones(8, device=device).sum().item()
        synchronize(device)
    except RuntimeError:
        return False
    return bool(value == 8.0)


class Clock:
    """The clock of a device, as `timing.interleave` wants it: by events, with the host ahead of the device.

    A short wait on the device comes first, so that the work of a whole block is in the queue before the first kernel
    runs: the time between the events is then that of the kernels alone, and the time the host took is known apart.
    """

    def __init__(self, device: str) -> None:
        """Time on this device; on the CPU both times are those of the wall clock."""
        self.device = device
        self._host: dict[int, float] = {}

    def block(self, call: Callable[[int], object], first: int, inner: int) -> tuple[float, float]:
        """Return the seconds of one call on the device, and those the host took to issue it."""
        if self.device == "cpu":
            start = time.perf_counter()
            for index in range(first, first + inner):
                call(index)
            seconds = (time.perf_counter() - start) / inner
            return seconds, seconds
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        expected = self._host.get(id(call), 0.0) * inner
        if expected:
            torch.cuda._sleep(int(min(LONGEST_WAIT, 1.3 * expected + 2e-5) * CYCLES_PER_SECOND))
        start = time.perf_counter()
        begin.record()
        for index in range(first, first + inner):
            call(index)
        end.record()
        host = (time.perf_counter() - start) / inner
        torch.cuda.synchronize()
        self._host[id(call)] = min(host, self._host.get(id(call), LONGEST_WAIT))
        return begin.elapsed_time(end) / 1e3 / inner, host


def ceilings(device: str) -> dict[str, Any]:
    """Measure the two rates every time is compared with: bytes copied (read and written), and matrix products."""
    clock = Clock(device)
    if device == "cpu":
        size, side, rounds = 1 << 20, 128, 3
    else:
        size, side, rounds = min(4 << 30, torch.cuda.get_device_properties(0).total_memory // 8), 8192, 12
    found: dict[str, Any] = {
        "copied_bytes": size,
        "copy_bytes_per_second": 2 * size / _copy(clock, device, size, rounds),
    }
    for dtype in ("bfloat16", "float16"):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        product = sorted(
            clock.block(lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out), i, 1)[0] for i in range(rounds)
        )
        found[f"{dtype}_flops_per_second"] = 2 * side**3 / product[rounds // 2]
    return {**found, "matrix_side": side}


def _copy(clock: Clock, device: str, size: int, rounds: int) -> float:
    """Return the median time in seconds of copying some bytes from one place on the device to another."""
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return sorted(clock.block(lambda _: target.copy_(source), i, 1)[0] for i in range(rounds))[rounds // 2]


def peak_memory(device: str, call: Callable[[int], Any]) -> dict[str, int] | None:
    """Return the bytes one call needs beyond what was there before and what it returns, or None without a device.

    "first" is the very first call, with whatever it keeps for later ones; "steady" is a call after it.
    """
    if device == "cpu":
        return None
    found = {}
    for name in ("first", "steady"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(0)
        torch.cuda.synchronize()
        tensors = result if isinstance(result, tuple | list) else [result]
        returned = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
        found[name] = torch.cuda.max_memory_allocated() - before - returned
        del result, tensors
    return found
