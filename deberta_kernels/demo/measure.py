"""Time and peak memory of two models, each measurement in a process of its own.

A forked child shares the weights with its parent and starts with nothing else, so neither an earlier length nor the
other model can hide or add memory. The parent must not have computed anything on several threads before: OpenMP's
threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.testing import memory

__all__ = ["MEMORY_METHOD", "Case", "MeasurementError", "difference_and_times", "in_child", "peak_memory"]

MEMORY_METHOD = (
    "peak resident memory above that of the loaded model, for one forward pass in a fresh process "
    "(VmHWM in /proc/self/status); what the patched model caches is included"
)
WARM_UP_TOKENS = 8


class MeasurementError(RuntimeError):
    """A measurement has no result; the message says why."""


@dataclass(frozen=True)
class Case:
    """One input of the demo.

    Attributes:
        label: name in the table.
        input_ids: (B, N) int64.
        attention_mask: (B, N) int64; 1 = real token.
    """

    label: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def tokens(self) -> int:
        """Return N, the padded length."""
        return self.input_ids.shape[1]


def in_child(work: Callable[[], dict[str, Any]], threads: int) -> dict[str, Any]:
    """Run `work` in a forked process with this many threads and return its result, which must survive JSON.

    Raises:
        MeasurementError: the process raised, or was killed.
    """
    receive, send = os.pipe()
    with warnings.catch_warnings():
        # Python warns when any thread exists; those of the tokenizer and hub libraries are idle here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            torch.set_num_threads(threads)
            warnings.simplefilter("ignore", dk.DebertaKernelsWarning)  # each process would repeat what the parent says
            answer: dict[str, Any] = {"result": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(send, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        cause = "killed, probably for want of memory" if status == -9 else f"ended with status {status}"
        raise MeasurementError(f"the measuring process was {cause}")
    received = json.loads(text)
    if "error" in received:
        raise MeasurementError(received["error"])
    return dict(received["result"])


def _forward(model: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model(input_ids=case.input_ids, attention_mask=case.attention_mask)[0]
    return hidden


def _warm_up(model: nn.Module, case: Case) -> None:
    short = Case(case.label, case.input_ids[:1, :WARM_UP_TOKENS], case.attention_mask[:1, :WARM_UP_TOKENS])
    _forward(model, short)


def peak_memory(model: nn.Module, case: Case) -> dict[str, Any]:
    """Return {"bytes": peak resident memory of one forward pass above that of the loaded model}.

    A pass over a few tokens comes first, so that libraries and thread pools are loaded and not counted.
    """
    _warm_up(model, case)
    with suppress(OSError):  # without it, the mark is that of this process, which has done nothing larger
        memory.reset_high_water()
    start = memory.status("VmRSS")
    _forward(model, case)
    return {"bytes": max(memory.status("VmHWM") - start, 0)}


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
        samples, calls (per backend), fallbacks (per reason).
    """
    for model in (before, after):
        _warm_up(model, case)
    dk.reset_stats()
    expected, got = _forward(before, case), _forward(after, case)
    counts = dk.stats()
    real = case.attention_mask.bool()
    difference = (expected[real].double() - got[real].double()).abs().max().item()
    samples: dict[str, list[float]] = {"before": [], "after": []}
    begin = time.perf_counter()
    while len(samples["after"]) < 2 or (len(samples["after"]) < pairs and time.perf_counter() - begin < seconds):
        for name, model in (("before", before), ("after", after)):
            start = time.perf_counter()
            _forward(model, case)
            samples[name].append(time.perf_counter() - start)
    return {
        "difference": difference,
        "scale": expected[real].abs().max().item(),
        "before": statistics.median(samples["before"]),
        "after": statistics.median(samples["after"]),
        "samples": samples,
        "calls": dict(counts["calls"]),
        "fallbacks": dict(counts["fallbacks"]),
    }
