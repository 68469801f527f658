"""The CUDA kernels without one of their barriers, waits, fences or arrivals at a time, by place in the source."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from ptx.drivers.cuda_driver import Device, memory_range
from ptx.drivers.cuda_modules import SOURCES
from ptx.machine import Machine
from ptx.mutations import Mutant, mutants, try_mutant

from tests.ptx.kernels.source_places import SourcePlaces

__all__ = ["ORDERS", "Launch", "outcomes", "place_of", "recorded"]

# Orders of warps: any; the producer or one of the consumers falls behind; one warp does.
ORDERS: tuple[tuple[int, ...], ...] = ((), (0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (5,), (10,))


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, kept to be run again.

    Attributes:
        machine: of the kernel.
        blocks: of the launch.
        arguments: as bytes; they point into the tensors of `memory`.
        memory: what the launch may touch, and whether it writes it.
        before: what the tensors that it writes held.
        exact: whether the results have the same bits in every order of warps and blocks.
    """

    machine: Machine
    blocks: int
    arguments: bytes
    memory: list[tuple[torch.Tensor, bool]]
    before: list[torch.Tensor]
    exact: bool

    def run(self, seed: int = 0, late: tuple[int, ...] = ()) -> list[torch.Tensor]:
        """Run it on the memory as it was; return what it wrote."""
        written = [x for x, writes in self.memory if writes]
        for x, held in zip(written, self.before, strict=True):
            x.copy_(held)
        memory = [memory_range(x, writes) for x, writes in self.memory]
        self.machine.launch((self.blocks,), self.arguments, memory, seed=seed, late=late)
        return [x.clone() for x in written]


@contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Collect the launches of a device."""
    found: list[Launch] = []
    launch = device.launch

    def keep(name: str, blocks: int, arguments: int) -> None:
        machine, memory = device.machines[name], list(device.memory)
        data = ctypes.string_at(arguments, machine.program.kernel.parameter_bytes)
        before = [x.clone() for x, writes in memory if writes]
        launch(name, blocks, arguments)
        exact = "backward" not in name or torch.are_deterministic_algorithms_enabled()
        found.append(Launch(machine, blocks, data, memory, before, exact))

    device.launch = keep  # type: ignore[method-assign]
    try:
        yield found
    finally:
        device.launch = launch  # type: ignore[method-assign]


def place_of(machine: Machine, mutant: Mutant) -> str:
    """Return opcode and place in the source of what a mutant lacks."""
    places = SourcePlaces("\n".join(machine.program.source), SOURCES)
    return f"{mutant.opcode} in {places.of(mutant.line)}"


def outcomes(
    launches: list[Launch], chosen: Callable[[list[Mutant]], list[Mutant]] = list
) -> Iterator[tuple[Mutant, str]]:
    """Take what orders something out of a kernel, one executed instruction at a time.

    Args:
        launches: of one kernel, which together execute all that is to be tried.
        chosen: picks those to try.

    Yields:
        each, and what was found, "" where nobody noticed.
    """
    runs = [_comparison(launch, seed, late) for seed, late in enumerate(ORDERS) for launch in launches]
    if any(run() for run in runs):
        raise RuntimeError(f"{launches[0].machine.name} gives other results in another order of warps")
    for mutant in chosen(mutants(launches[0].machine)):
        yield mutant, try_mutant(launches[0].machine, mutant, runs)


def _comparison(launch: Launch, seed: int, late: tuple[int, ...]) -> Callable[[], str]:
    expected = launch.run()

    def compare() -> str:
        found = launch.run(seed, late)
        same = all(_equal(a, b, launch.exact) for a, b in zip(found, expected, strict=True))
        return "" if same else "wrong result"

    return compare


def _equal(a: torch.Tensor, b: torch.Tensor, exact: bool) -> bool:
    if exact or not a.is_floating_point():
        return bool(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)))
    # Sums in another order differ in float32's last places.
    return bool(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4, equal_nan=True))
