"""Memory that one attention call needs beyond its inputs and outputs, in a process of its own.

Run as a program it measures one length and prints JSON; `extra_bytes` runs it so.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.core.candidates import draw, ours
from benchmarks.harness.process import run_alone
from benchmarks.registry import Shape
from deberta_kernels.testing.memory import peak

__all__ = ["extra_bytes"]


def extra_bytes(length: int, dtype: str, backend: str, threads: int, *, backward: bool = False) -> dict[str, Any]:
    """Return {"bytes": extra} of a fresh process, or {"error": text}."""
    arguments = [str(length), "--dtype", dtype, "--backend", backend, "--threads", str(threads)]
    return run_alone("benchmarks.core.memory", [*arguments, *(["--backward"] if backward else [])])


def _measure(length: int, dtype: str, backend: str, *, backward: bool) -> dict[str, Any]:
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
    torch.set_num_threads(options.threads)
    print(json.dumps(_measure(options.length, options.dtype, options.backend, backward=options.backward)))


if __name__ == "__main__":
    main()
