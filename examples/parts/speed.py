"""This run's own batches on the patched and on the stock model: speed and peak memory, one beside the other."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import deberta_kernels as dk
from deberta_kernels.testing import memory

__all__ = ["compare", "table"]

MOST_BATCHES = 16


class Memory:
    """The peak of memory from now on, beyond what is held now, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):  # Linux can
            memory.reset_high_water()
        self._before = _highest()

    def peak(self) -> int:
        """Return bytes."""
        return (torch.cuda.max_memory_allocated() if self._cuda else _highest()) - self._before


def _highest() -> int:
    with suppress(RuntimeError):
        return memory.status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(
    model: Any,
    batches: list[dict[str, Tensor]],
    loss_of: Callable[[Any, dict[str, Tensor]], Tensor],
    device: str,
    limit: float,
) -> dict[str, Any]:
    """Time forward and backward, and the forward of inference, in turns on the patched and the stock model.

    Args:
        model: patched; left so. Its weights are not changed.
        batches: on the device.
        loss_of: computes the loss, in the precision of the run.
        device: of the model.
        limit: seconds after which no further batch is begun.

    Returns:
        "batches" that were timed and their "tokens"; for "patched" and "stock": "training" and "inference", tokens per
        second, and "memory", the peak in bytes of a training step beyond the weights.
    """
    batches = batches[:MOST_BATCHES]
    kinds: dict[str, Callable[[], Any]] = {"patched": lambda: dk.patch(model), "stock": lambda: dk.unpatch(model)}
    seconds = {kind: {"training": 0.0, "inference": 0.0} for kind in kinds}
    peaks = {}
    begun = time.perf_counter()
    for kind, change in kinds.items():  # the first batch is run once more than it is timed
        change()
        _training(model, batches[0], loss_of, device)
        _inference(model, batches[0], loss_of, device)
        watch = Memory(device)
        _training(model, batches[0], loss_of, device)
        peaks[kind] = watch.peak()
    tokens = done = 0
    for number, batch in enumerate(batches):
        if done and time.perf_counter() - begun > limit:
            break
        for kind in list(kinds) if number % 2 else list(kinds)[::-1]:
            kinds[kind]()
            seconds[kind]["training"] += _training(model, batch, loss_of, device)
            seconds[kind]["inference"] += _inference(model, batch, loss_of, device)
        tokens, done = tokens + int(batch["attention_mask"].sum()), done + 1
    dk.patch(model)
    measured = {
        kind: {**{part: tokens / taken for part, taken in parts.items()}, "memory": peaks[kind]}
        for kind, parts in seconds.items()
    }
    return {"batches": done, "tokens": tokens, "device": device, "threads": torch.get_num_threads(), **measured}


def _training(model: nn.Module, batch: dict[str, Tensor], loss_of: Callable[..., Tensor], device: str) -> float:
    model.train()
    start = _now(device)
    loss_of(model, batch).backward()
    end = _now(device)
    model.zero_grad(set_to_none=True)
    return end - start


@torch.no_grad()
def _inference(model: nn.Module, batch: dict[str, Tensor], loss_of: Callable[..., Tensor], device: str) -> float:
    model.eval()
    start = _now(device)
    loss_of(model, batch)
    return _now(device) - start


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(found: dict[str, Any]) -> str:
    """Return what `compare` found as a table in Markdown."""
    patched, stock = found["patched"], found["stock"]
    lines = ["| | patched | stock | patched against stock |", "|---|---:|---:|---:|"]
    for part, name in (("training", "forward and backward, tokens/s"), ("inference", "inference, tokens/s")):
        times = f"{patched[part] / stock[part]:.2f} times the speed"
        lines.append(f"| {name} | {patched[part]:,.0f} | {stock[part]:,.0f} | {times} |")
    if min(patched["memory"], stock["memory"]) > 0:
        mb = [f"{kind['memory'] / 1e6:,.0f}" for kind in (patched, stock)]
        share = f"{patched['memory'] / stock['memory']:.0%} of the memory"
        lines.append(f"| peak memory of a step beyond the weights, MB | {mb[0]} | {mb[1]} | {share} |")
    return "\n".join(lines)
