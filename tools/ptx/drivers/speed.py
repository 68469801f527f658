"""How fast the machine is: `PYTHONPATH=.:tools python -m ptx.drivers.speed`, with Triton on the path if it is to count.

Forward and backward of 1,200 tokens, one head of 64, bfloat16, after a first run that compiles. On one core; the time
is that of the process, so that others on the machine count little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import Case
from ptx.drivers import cuda_driver, cuda_modules
from ptx.machine import Machine

CASE = Case(batch=1, heads=1, nq=1200, dtype=torch.bfloat16)


def devices() -> Iterator[tuple[str, str, Any, Any]]:
    """Yield name, backend, driver and device of what can be executed here."""
    if cuda_modules.compilers():
        yield "CUDA, sm_90a", "cuda", cuda_driver, cuda_driver.Device()
    if find_spec("triton"):
        from ptx.drivers import triton_driver

        for architecture in (80, 90):
            yield f"Triton, sm_{architecture}", "triton", triton_driver, triton_driver.Device(architecture)


def speed(backend: str, driver: Any, device: Any) -> tuple[int, float]:
    """Return the warp instructions that a call executes, and the seconds they take."""
    problem = inputs.problem(CASE)
    spent = [0.0]
    launch = Machine.launch

    def timed(*arguments: Any, **more: Any) -> None:
        start = time.process_time()
        launch(*arguments, **more)
        spent[0] += time.process_time() - start

    with driver.installed(device), mock.patch.object(Machine, "launch", timed):
        for _ in range(2):
            spent[0] = 0.0
            for machine in device.machines.values():
                machine.counts[:] = 0
            budget.evaluate(Target("ptx", backend, (CASE.dtype,)).run, problem, inputs.dout(CASE, problem))
    return sum(int(machine.counts[:, 0].sum()) for machine in device.machines.values()), spent[0]


if __name__ == "__main__":
    for name, backend, driver, device in devices():
        executed, seconds = speed(backend, driver, device)
        rate = executed / seconds / 1e6
        print(
            f"{name:15s} {executed:12,d} warp instructions in {seconds:6.2f} s, {rate:.1f} million a second", flush=True
        )
