"""Time and peak memory of models that take turns, each measurement in a process of its own.

A forked child shares the weights with its parent and starts with nothing else, so neither an earlier length nor the
other model can hide or add memory. The parent must not have computed anything on several threads before: OpenMP's
threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.testing import memory

__all__ = [
    "MEMORY_METHOD",
    "Case",
    "MeasurementError",
    "Times",
    "can_measure",
    "difference_and_times",
    "forward",
    "in_child",
    "peak_memory",
    "take_turns",
    "warm_up",
]

MEMORY_METHOD = (
    "peak resident memory above that of the loaded model, for one forward pass in a fresh process "
    "(VmHWM in /proc/self/status); what the patched model caches is included"
)
WARM_UP_TOKENS = 8


class MeasurementError(RuntimeError):
    """A measurement has no result; the message says why."""


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        label: name in the table.
        input_ids: (B, N) int64; (B, 1, N) for a head that chooses among texts.
        attention_mask: of the same shape, int64; 1 = real token.
        extra: what else the model is given, by name.
    """

    label: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return N, the padded length."""
        return self.input_ids.shape[-1]


@dataclass
class Times:
    """How long each call took, in seconds.

    Attributes:
        wall: by the clock.
        cpu: of the processor, all threads of the process together.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def can_measure() -> bool:
    """Tell whether this system has what measuring memory needs: fork and /proc."""
    return hasattr(os, "fork") and Path("/proc/self/status").exists()


def in_child(work: Callable[[], dict[str, Any]], threads: int) -> dict[str, Any]:
    """Run `work` in a forked process with this many threads and return its result, which must survive JSON.

    Raises:
        MeasurementError: the process raised, or was killed.
    """
    receive, send = os.pipe()
    # A Ctrl-C waits until both processes are where they can take it.
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        with warnings.catch_warnings():
            # Python warns when any thread exists; those of the tokenizer and hub libraries are idle here.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError:  # no memory, or too many processes
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        raise
    if child == 0:
        os.close(receive)
        _answer(work, threads, send, allowed)
    os.close(send)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        with os.fdopen(receive) as pipe:
            text = pipe.read()
    except BaseException:  # interrupted: the child must not go on by itself
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        cause = "killed, probably for want of memory" if status == -9 else f"ended with status {status}"
        raise MeasurementError(f"the measuring process was {cause}")
    received = json.loads(text)
    if "error" in received:
        raise MeasurementError(received["error"])
    return dict(received["result"])


def _answer(work: Callable[[], dict[str, Any]], threads: int, send: int, allowed: set[Any]) -> NoReturn:
    """Be the child: compute, write the answer into the pipe, and end, whatever happens."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # it ends without a word: the parent has the word
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        try:
            torch.set_num_threads(threads)
            warnings.simplefilter("ignore", dk.DebertaKernelsWarning)  # each process would repeat what the parent says
            answer = json.dumps({"result": work()})
        except BaseException:
            answer = json.dumps({"error": traceback.format_exc()})
        with suppress(BrokenPipeError), os.fdopen(send, "w") as pipe:  # broken: the parent is gone
            pipe.write(answer)
    finally:
        os._exit(0)


def forward(model: nn.Module, case: Case) -> Any:
    """Run one batch; return what the model returns."""
    with torch.no_grad():
        return model(input_ids=case.input_ids, attention_mask=case.attention_mask, **case.extra)


def warm_up(model: nn.Module, case: Case) -> None:
    """Run a few tokens of a batch, so that libraries, thread pools and kept tables are there and not counted."""
    few = {name: x[:1, ..., :WARM_UP_TOKENS] for name, x in case.extra.items()}
    ids, mask = (x[:1, ..., :WARM_UP_TOKENS] for x in (case.input_ids, case.attention_mask))
    forward(model, Case(case.label, ids, mask, few))


def peak_memory(model: nn.Module, case: Case) -> dict[str, Any]:
    """Return {"bytes": peak resident memory of one forward pass above that of the loaded model}."""
    warm_up(model, case)
    with suppress(OSError):  # without it, the mark is that of this process, which has done nothing larger
        memory.reset_high_water()
    start = memory.status("VmRSS")
    forward(model, case)
    return {"bytes": max(memory.status("VmHWM") - start, 0)}


def take_turns(
    models: Mapping[str, nn.Module],
    case: Case,
    times: Mapping[str, Times],
    first: int = 0,
    keep: Callable[[Any], Any] = lambda output: None,
) -> dict[str, Any]:
    """Run a batch through each model once, and add how long each took.

    Args:
        models: name -> model.
        case: the batch.
        times: name -> where to add.
        first: number of the model that begins, counted around: who follows whom should change.
        keep: what to keep of a model's output, before the next model runs; not timed.

    Returns:
        Name -> what was kept.
    """
    names = list(models)
    start = first % len(names)
    found = {}
    for name in names[start:] + names[:start]:
        wall, cpu = time.perf_counter(), time.process_time()
        output = forward(models[name], case)
        times[name].cpu.append(time.process_time() - cpu)
        times[name].wall.append(time.perf_counter() - wall)
        found[name] = keep(output)
        del output
    return found


def difference_and_times(before: nn.Module, after: nn.Module, case: Case, pairs: int, seconds: float) -> dict[str, Any]:
    """Time both models in turn, and compare what they return for the real tokens.

    Args:
        before: the model as it was.
        after: the patched model.
        case: the input.
        pairs: at most this many timings of each; at least two.
        seconds: begin no further pair after this time.

    Returns:
        difference (largest, over real tokens), scale (largest |output|), before and after (medians in seconds),
        cpu_before and cpu_after (medians of the processor's time in seconds), samples, calls (per backend),
        fallbacks (per reason).
    """
    models = {"before": before, "after": after}
    times = {name: Times() for name in models}
    for model in models.values():
        warm_up(model, case)
    dk.reset_stats()
    begin = time.perf_counter()
    real = case.attention_mask.bool()
    found = take_turns(models, case, times, keep=lambda output: output[0][real])
    counts = dk.stats()
    expected, got = (found[name] for name in models)
    difference = (expected.double() - got.double()).abs().max().item()
    while len(times["after"].wall) < 2 or (len(times["after"].wall) < pairs and time.perf_counter() - begin < seconds):
        take_turns(models, case, times, first=len(times["after"].wall))
    return {
        "difference": difference,
        "scale": expected.abs().max().item(),
        **{name: statistics.median(times[name].wall) for name in models},
        **{f"cpu_{name}": statistics.median(times[name].cpu) for name in models},
        "samples": {name: times[name].wall for name in models},
        "calls": dict(counts["calls"]),
        "fallbacks": dict(counts["fallbacks"]),
    }
