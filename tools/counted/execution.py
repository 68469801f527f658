"""The kernels executed zone by zone, by the package's own launches over the PTX machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from offline.variants import deterministically
from ptx.machine import Machine

from counted.zones import Counts, Zone, by_zone, problem, zones_of

__all__ = ["Executed", "of_cuda", "of_triton"]


@dataclass(frozen=True)
class Executed:
    """One kernel, executed.

    Attributes:
        machine: that ran it.
        blocks: thread blocks of the problem that the program's part was read from.
        zones: counts of a step by a step, and of all programs, by zone; see `by_zone`.
    """

    machine: Machine
    blocks: int
    zones: dict[str, np.ndarray]


class _Runner:
    """Problems of one variant, run on one device."""

    def __init__(
        self, backend: Any, device: Any, features: str, dtype: torch.dtype, head_dim: int, grad: bool,
        two_modes: bool = False,
    ) -> None:  # fmt: skip
        self.backend, self.device, self.grad = backend, device, grad
        self.variant = features, dtype, head_dim
        # Triton's deterministic kernels are others, the CUDA kernels the same in another grid.
        self.modes = (False, True) if two_modes and "bias" in features else (False,)
        self.blocks: dict[str, int] = {}

    def executed(self) -> dict[str, Executed]:
        """Return every kernel that ran, by name."""
        zones = by_zone(zones_of(self.variant[0]), self.run)
        return {name: Executed(self.machines()[name], self.blocks[name], parts) for name, parts in zones.items()}

    def machines(self) -> dict[str, Machine]:
        """Return the machines of all kernels by name: "name (2)" where one was compiled again, for another tile."""
        found: dict[str, Machine] = {}
        for machine in self.device.machines.values():
            others = sum(name.split(" ")[0] == machine.name for name in found)
            found[f"{machine.name} ({others + 1})" if others else machine.name] = machine
        return found

    def run(self, zone: Zone, steps: tuple[int, int]) -> Counts:
        """Return what each kernel executes for the problem of a zone."""
        for machine in self.device.machines.values():
            machine.counts[:] = 0
        made = problem(zone, *self.variant, steps)
        out, lse = self.backend.forward(made)
        if self.grad:
            dout = torch.randn_like(out)
            for deterministic in self.modes:
                with deterministically(deterministic):
                    self.backend.backward(made, dout, None, out, lse, (True,) * 5)
        found = {name: machine.counts.copy() for name, machine in self.machines().items()}
        for name, machine in self.machines().items():
            # Every warp executes the first instruction once.
            self.blocks.setdefault(name, int(machine.counts[0, 0]) // (machine.threads // 32))
        return {name: counts for name, counts in found.items() if counts.any()}


def of_triton(architecture: int, features: str, dtype: torch.dtype, head_dim: int) -> dict[str, Executed]:
    """Return the kernels of a forward and a backward of Triton's, by name."""
    from ptx.drivers import triton_driver

    from deberta_kernels.impl import triton as backend

    with triton_driver.installed(triton_driver.Device(architecture)) as device:
        return _Runner(backend, device, features, dtype, head_dim, True, two_modes=True).executed()


def of_cuda(
    features: str, dtype: torch.dtype, head_dim: int, *, grad: bool, compiler: str | None = None
) -> dict[str, Executed]:
    """Return the kernels of a forward, and with `grad` a backward, of csrc/cuda, by name.

    Args:
        features: as in `offline.variants.Variant`.
        dtype: of q.
        head_dim: D.
        grad: whether there is a backward.
        compiler: see `ptx.drivers.cuda_modules.compile_module`.
    """
    from ptx.drivers import cuda_driver

    from deberta_kernels.impl import cuda as backend

    with cuda_driver.installed(cuda_driver.Device(compiler)) as device:
        return _Runner(backend, device, features, dtype, head_dim, grad).executed()
