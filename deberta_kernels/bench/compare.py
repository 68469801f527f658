"""Stock and patched models, in one dtype or several, taking turns batch by batch; memory in processes of their own."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels import dtypes
from deberta_kernels.bench.agreement import Agreement, Answers, answers_of
from deberta_kernels.bench.batches import Batches
from deberta_kernels.demo.measure import Times, in_child, peak_memory, take_turns, warm_up
from deberta_kernels.demo.model import shared_copy

__all__ = ["Candidate", "Measured", "candidates", "measure"]

FURTHER_SECONDS = 20.0  # passes after the first take no longer than this in all
MOST_PASSES = 5

# Called with how much of the work is done (0 to 1) and what is being done.
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Candidate:
    """One model that is measured.

    Attributes:
        name: in table and picture, such as "patched bfloat16".
        dtype: name of its dtype.
        patched: whether it is.
        model: shares its weights with the other one of its dtype.
    """

    name: str
    dtype: str
    patched: bool
    model: nn.Module


@dataclass(frozen=True)
class Measured:
    """What was found of one model; times in seconds, a batch each, the median over passes.

    Attributes:
        name: of the candidate.
        dtype: of its weights.
        patched: whether it is.
        wall: by the clock.
        cpu: of the processor, all threads together.
        bytes: peak memory of the largest batch above the loaded model.
        first: compared with the first candidate.
        stock: compared with the stock model of the same dtype.
    """

    name: str
    dtype: str
    patched: bool
    wall: list[float]
    cpu: list[float]
    bytes: int
    first: Agreement
    stock: Agreement


def candidates(model: nn.Module, wanted: Sequence[torch.dtype]) -> list[Candidate]:
    """Return a stock and a patched model for each dtype.

    Raises:
        ValueError: there is no DeBERTa inside.
    """
    found = []
    for dtype in wanted:
        stock = model if next(model.parameters()).dtype == dtype else copy.deepcopy(model).to(dtype)
        patched = shared_copy(stock)
        dk.patch(patched)
        name = dtypes.name(dtype)
        found += [Candidate(f"stock {name}", name, False, stock), Candidate(f"patched {name}", name, True, patched)]
    return found


def measure(
    models: Sequence[Candidate], batches: Batches, threads: int, progress: Progress
) -> tuple[list[Measured], dict[str, Any]]:
    """Measure the models.

    Returns:
        (One result for each model; {"calls": per backend, "fallbacks": per reason, "passes": how many}).

    Raises:
        MeasurementError: a process failed, or was killed.
    """
    memory = {}
    for one in models:
        progress(0.0, f"memory, {one.name}")
        memory[one.name] = in_child(lambda model=one.model: peak_memory(model, batches.largest), threads)["bytes"]  # type: ignore[misc]
    found = in_child(lambda: _timed(models, batches, progress), threads)
    measured = [
        Measured(
            one.name, one.dtype, one.patched,
            found["wall"][one.name], found["cpu"][one.name], memory[one.name],
            Agreement(**found["first"][one.name]), Agreement(**found["stock"][one.name]),
        )
        for one in models
    ]  # fmt: skip
    return measured, {name: found[name] for name in ("calls", "fallbacks", "passes")}


def _timed(models: Sequence[Candidate], batches: Batches, progress: Progress) -> dict[str, Any]:
    """Time every batch with every model, and compare the answers of the first pass; runs in a process of its own."""
    named = {one.name: one.model for one in models}
    times = [{name: Times() for name in named} for _ in batches.cases]
    first, stock = ({name: Agreement() for name in named} for _ in range(2))
    several = getattr(models[0].model.config, "problem_type", None) == "multi_label_classification"
    for model in named.values():
        warm_up(model, batches.largest)
    dk.reset_stats()
    begin, done = time.perf_counter(), 0
    for number, case in enumerate(batches.cases):
        keep = functools.partial(answers_of, case=case, several_labels=several)
        answers = take_turns(named, case, times[number], first=number, keep=keep)
        _compare(models, answers, first, stock)
        done += case.input_ids.numel()
        progress(done / batches.padded, f"batch {number + 1} of {len(batches.cases)}")
    counts, seconds = dk.stats(), time.perf_counter() - begin
    passes = max(1, min(MOST_PASSES, 1 + int(FURTHER_SECONDS / seconds)))
    for again in range(1, passes):
        for number, case in enumerate(batches.cases):
            take_turns(named, case, times[number], first=number + again)
        progress(1.0, f"pass {again + 1} of {passes}")
    return {
        "wall": {name: [statistics.median(batch[name].wall) for batch in times] for name in named},
        "cpu": {name: [statistics.median(batch[name].cpu) for batch in times] for name in named},
        "first": {name: asdict(found) for name, found in first.items()},
        "stock": {name: asdict(found) for name, found in stock.items()},
        "calls": dict(counts["calls"]),
        "fallbacks": dict(counts["fallbacks"]),
        "passes": passes,
    }


def _compare(
    models: Sequence[Candidate],
    answers: dict[str, Answers],
    first: dict[str, Agreement],
    stock: dict[str, Agreement],
) -> None:
    unpatched = {one.dtype: answers[one.name] for one in models if not one.patched}
    for one in models:
        first[one.name].add(answers[models[0].name], answers[one.name])
        stock[one.name].add(unpatched[one.dtype], answers[one.name])
