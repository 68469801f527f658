"""Launches of Triton's kernels kept to be run again: the same memory, few blocks, another order of warps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ptx.drivers.triton_driver import Device, laid_out, memory_of
from ptx.machine import Machine, Memory
from ptx.mutations import Mutant, is_ordering, mutants, try_mutant, without
from ptx.redundant.reasons import reason

__all__ = ["Launch", "outcomes", "recorded"]

# Orders of warps: any, one falls behind, all but one do.
_ORDERS: tuple[tuple[int, ...], ...] = ((), (0,), (1, 2, 3))
# How often one block should execute an instruction that orders something, so that loops meet their own past.
_OFTEN = 3


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        machine: of the kernel.
        grid: of it.
        arguments: with the tensors, which stay as long as this does.
        before: what the memory of the tensors held, by address.
        written: addresses of the memory that it changed.
        blocks: those to run; None: all.
    """

    machine: Machine
    grid: tuple[int, int, int]
    arguments: list[Any]
    before: dict[int, torch.UntypedStorage]
    written: tuple[int, ...]
    blocks: tuple[int, ...] | None = None

    def run(self, *, seed: int = 0, late: tuple[int, ...] = ()) -> bytes:
        """Run it on the memory as it was, and return what is there now."""
        storages = _storages(self.arguments)
        for address, held in self.before.items():
            storages[address].copy_(held)
        memory: list[Memory] = memory_of(self.arguments)
        arguments = laid_out(self.machine, self.arguments)
        self.machine.launch(self.grid, arguments, memory, seed=seed, late=late, blocks=self.blocks)
        return b"".join(_bytes(storages[address]) for address in self.written)


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return torch.tensor(storage, dtype=torch.uint8).numpy().tobytes()


def _storages(arguments: list[Any]) -> dict[int, torch.UntypedStorage]:
    found = (x.untyped_storage() for x in arguments if isinstance(x, torch.Tensor) and x.numel())
    return {storage.data_ptr(): storage for storage in found}


@contextmanager
def recorded(device: Device) -> Iterator[dict[str, list[Launch]]]:
    """Collect the launches of a device, by the key that Triton gives a compiled kernel."""
    found: dict[str, list[Launch]] = {}
    launch = device.launch

    def keep(key: str, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        before = {address: storage.clone() for address, storage in _storages(arguments).items()}
        launch(key, grid, arguments)
        after = _storages(arguments)
        written = tuple(at for at, held in before.items() if _bytes(held) != _bytes(after[at]))
        found.setdefault(key, []).append(Launch(device.machines[key], grid, arguments, before, written))

    device.launch = keep  # type: ignore[method-assign]
    try:
        yield found
    finally:
        device.launch = launch  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Block:
    """One block, run.

    Attributes:
        launch: number of its launch.
        number: of the block.
        executed: how often each instruction was, by a warp, as far as that matters.
        cost: instructions of all warps.
    """

    launch: int
    number: int
    executed: np.ndarray
    cost: int


def _blocks(launches: list[Launch]) -> list[_Block]:
    machine = launches[0].machine
    often = np.array([_OFTEN if is_ordering(opcode) else 1 for opcode in machine.program.opcodes])
    kept, found = machine.counts.copy(), []
    for number, launch in enumerate(launches):
        for block in range(int(np.prod(launch.grid))):
            machine.counts[:] = 0
            replace(launch, blocks=(block,)).run()
            counts = machine.counts[:, 0]
            by_warp = np.minimum(-(-counts * 32 // machine.threads), often)
            found.append(_Block(number, block, by_warp, int(counts.sum())))
    machine.counts[:] = kept
    return found


def _only(launches: list[Launch], blocks: list[_Block]) -> list[Launch]:
    if any(opcode.startswith(("atom.global", "red.global")) for opcode in launches[0].machine.program.opcodes):
        # What several blocks add to depends on their order: each by itself.
        return [replace(launches[block.launch], blocks=(block.number,)) for block in blocks]
    chosen: dict[int, list[int]] = {}
    for block in blocks:
        chosen.setdefault(block.launch, []).append(block.number)
    return [replace(launches[number], blocks=tuple(found)) for number, found in chosen.items()]


def _covering(blocks: list[_Block]) -> list[_Block]:
    """Return few blocks that execute all that any executes, loops several times; greedily, by gain for cost."""
    reached, chosen = np.zeros_like(blocks[0].executed), []
    while True:
        gains = [np.maximum(block.executed - reached, 0).sum() / block.cost for block in blocks]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            return chosen
        chosen.append(blocks[best])
        reached = np.maximum(reached, blocks[best].executed)


def _distinct(blocks: list[_Block]) -> list[_Block]:
    """Return the cheapest block of each way through the kernel."""
    found: dict[bytes, _Block] = {}
    for block in sorted(blocks, key=lambda block: block.cost):
        found.setdefault(block.executed.tobytes(), block)
    return list(found.values())


def outcomes(launches: list[Launch]) -> dict[Mutant, tuple[str, str]]:
    """Take what orders something out of a kernel, one executed instruction at a time.

    Args:
        launches: of one kernel, which together execute all that is to be tried.

    Returns:
        for each "noticed" and what was found, "redundant" and why, or "unexplained" and nothing.

    Raises:
        PtxError: something is wrong with the kernel as it is.
        RuntimeError: its results depend on the order of warps.
    """
    machine = launches[0].machine
    blocks = _blocks(launches)
    few, every = _only(launches, _covering(blocks)), _only(launches, _distinct(blocks))
    runs = [_comparison(launch, seed, late) for seed, late in enumerate(_ORDERS) for launch in few]
    runs += [_comparison(launch, 0, ()) for launch in every]
    excused = list(map(_excused, every))
    if any(run() for run in runs):
        raise RuntimeError(f"{machine.name} gives other bits in another order of warps")
    found = {}
    for mutant in mutants(machine):
        if what := try_mutant(machine, mutant, runs):
            found[mutant] = "noticed", what
            continue
        why = reason(machine.program, mutant.index, machine.counts[:, 0])
        if why == "other bytes":
            with without(machine, mutant):
                why = why if list(map(_excused, every)) == excused else ""
        found[mutant] = ("redundant" if why else "unexplained"), why
    return found


def _comparison(launch: Launch, seed: int, late: tuple[int, ...]) -> Callable[[], str]:
    expected = launch.run()
    return lambda: "" if launch.run(seed=seed, late=late) == expected else "wrong result"


def _excused(launch: Launch) -> int:
    launch.run()
    return launch.machine.excused
