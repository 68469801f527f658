"""CPU time of several candidates, interleaved in one run, so that drift hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Block", "Pace", "Samples", "interleave", "least_cpu_time", "rotating"]

# Runs a call for `inner` counters from `first` on; returns two times of one call in seconds, the one that counts first.
Block = Callable[[Callable[[int], object], int, int], tuple[float, float]]


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        rounds: rounds wanted; one round runs a block of every candidate.
        least: rounds run even when the time is up.
        seconds: time, in seconds of the wall clock, after which no further round starts.
        block: time, in seconds, one block should last; short calls are repeated to fill it. 0: one call is a block, and
            no call comes before the first round, for calls that take seconds and ran before.
    """

    rounds: int = 25
    least: int = 5
    seconds: float = 11.0
    block: float = 0.006


@dataclass(frozen=True)
class Samples:
    """The times of one candidate, in seconds of one call.

    Attributes:
        median: of CPU time over all rounds; on a GPU, of the time between two events.
        minimum: of the same time.
        p20: 20th percentile of the same time.
        p80: 80th percentile of the same time.
        wall_median: of wall-clock time; on a GPU, of the time the host needs to issue the work.
        wall_minimum: of the same time.
        rounds: number of samples.
        inner: calls in one sample.
    """

    median: float
    minimum: float
    p20: float
    p80: float
    wall_median: float
    wall_minimum: float
    rounds: int
    inner: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields with times rounded to nanoseconds."""
        return {key: round(value, 9) if isinstance(value, float) else value for key, value in asdict(self).items()}


def _percentile(ordered: list[float], fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _summary(cpu: list[float], wall: list[float], inner: int) -> Samples:
    ordered = sorted(cpu)
    return Samples(
        median=statistics.median(ordered),
        minimum=ordered[0],
        p20=_percentile(ordered, 0.2),
        p80=_percentile(ordered, 0.8),
        wall_median=statistics.median(wall),
        wall_minimum=min(wall),
        rounds=len(ordered),
        inner=inner,
    )


def _block(call: Callable[[int], object], first: int, inner: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(first, first + inner):
        call(index)
    return (time.process_time() - cpu) / inner, (time.perf_counter() - wall) / inner


def least_cpu_time(call: Callable[[], object], rounds: int, calls: int = 1) -> float:
    """Return the least CPU time of a call in seconds, over rounds of `calls` in a row."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        times.append(time.process_time() - start)
    return min(times) / calls


def rotating(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[int], Any]:
    """Return a call as a function of a counter, which picks the inputs in turn."""
    return lambda index: call(inputs[index % len(inputs)])


def interleave(
    candidates: Mapping[str, Callable[[int], object]], pace: Pace, block: Block = _block
) -> dict[str, Samples]:
    """Time the candidates in turn: A B C, then B C A, then C A B, and so on.

    CPU time is that of the whole process, so a candidate gains nothing from a hidden thread. Moving the start
    changes who runs after whom, so nobody always finds the caches one certain neighbour left behind.

    Args:
        candidates: name -> function of a counter; the counter picks the inputs, which rotate.
        pace: how long.
        block: the clock; that of the process, unless another is given.

    Returns:
        Name -> samples, in the order given.
    """
    names = list(candidates)
    inner = dict.fromkeys(names, 1)
    for name, call in candidates.items() if pace.block else ():
        seconds = max(block(call, 0, 1))  # the first call loads, allocates and compiles
        if seconds < 100 * pace.block:
            seconds = max(block(call, 1, 1))
        inner[name] = max(1, min(256, round(pace.block / max(seconds, 1e-7))))
    for name in names:  # and a full block, so that the slowest warm-up is no sample
        if inner[name] > 1:
            block(candidates[name], 0, inner[name])
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(pace.rounds):
            if turn >= pace.least and time.perf_counter() - start > pace.seconds:
                break
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                block_cpu, block_wall = block(candidates[name], turn * inner[name], inner[name])
                cpu[name].append(block_cpu)
                wall[name].append(block_wall)
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(cpu[name], wall[name], inner[name]) for name in names}
