"""Memory that one attention call needs beyond its inputs and outputs, in a process of its own."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.core.candidates import draw, ours
from benchmarks.harness.process import run_alone
from benchmarks.registry import Shape
from deberta_kernels.testing.memory import peak

__all__ = ["extra_bytes", "measure"]


def extra_bytes(length: int, dtype: str, backend: str, threads: int, *, backward: bool = False) -> dict[str, Any]:
    """Return {"bytes": extra} of a fresh process, or {"error": text}."""
    return run_alone(measure, threads, length=length, dtype=dtype, backend=backend, backward=backward)


def measure(length: int, dtype: str, backend: str, *, backward: bool) -> dict[str, Any]:
    """Measure one length in this process."""

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
