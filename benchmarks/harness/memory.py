"""Measure the memory one attention call needs beyond its inputs and outputs, in a process of its own.

Run as a program it measures one length and prints JSON; `extra_bytes` runs it so.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness.process import run_alone

__all__ = ["extra_bytes", "peak"]


def extra_bytes(length: int, dtype: str, backend: str, threads: int, *, backward: bool = False) -> dict[str, Any]:
    """Return {"bytes": extra} of a fresh process, or {"error": text}."""
    arguments = [str(length), "--dtype", dtype, "--backend", backend, "--threads", str(threads)]
    return run_alone("benchmarks.harness.memory", [*arguments, *(["--backward"] if backward else [])])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def peak(call: Callable[[], list[Any]]) -> dict[str, Any]:
    """Return the high-water mark of one call above what the process held before, less the bytes of what it returns.

    Args:
        call: returns the tensors that are results; something smaller should have been run before, so that libraries are
            loaded and threads started.
    """
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: freed pages would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present
    before = _status("VmRSS")
    results = call()
    highest = _status("VmHWM")
    returned = sum(x.numel() * x.element_size() for x in results)
    return {"bytes": highest - before - returned, "returned": returned, "held_before": before}


def _measure(length: int, dtype: str, backend: str, *, backward: bool) -> dict[str, Any]:
    """Return the `peak` of one call above the inputs."""
    import torch

    from benchmarks.core.candidates import draw, ours
    from benchmarks.registry import Shape

    def run(inputs: Any) -> list[Any]:
        with torch.set_grad_enabled(backward):
            out = ours(inputs, backend, prepare=False)()
        gradients = torch.autograd.grad(out, inputs.leaves, inputs.dout) if backward else ()
        return [out, *gradients]

    short, inputs = draw(Shape(1, 64, dtype)), draw(Shape(1, length, dtype))
    if backward:
        short, inputs = short.requiring_grad(), inputs.requiring_grad()
    run(short)  # loads the library and starts the threads, which is not the call's own memory
    return peak(lambda: run(inputs))


def main() -> None:
    """Measure one length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("length", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    print(json.dumps(_measure(options.length, options.dtype, options.backend, backward=options.backward)))


if __name__ == "__main__":
    main()
