"""The attention cores timed on the device, each shape only after every candidate has given the right answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.core import rivals
from benchmarks.core.candidates import CORES, candidates, hugging_face_core, our_core
from benchmarks.core.checking import check_candidates
from benchmarks.gpu.cases import asked, is_for
from benchmarks.gpu.device import Clock, free_memory, peak_memory
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import Item
from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.work import floor
from benchmarks.registry import PEERS, Shape
from deberta_kernels.testing.inputs import Case

__all__ = ["compiled_items", "core_items", "register_compiled", "rival_items"]

# Memory the float64 oracle of one score takes with its gradients, in bytes.
ORACLE_BYTES = 320
SMALL_SCORES = 1 << 20


def core_items(plan: Plan, rates: dict[str, Any]) -> list[Item]:
    """Return one item per shape: ours, flash attention without positions, and Hugging Face's eager code."""
    names = {"bare", "sdpa", "huggingface", *_others(plan)}
    return [_item(plan, shape, names, rates) for shape in plan.shapes()]


def rival_items(plan: Plan, rates: dict[str, Any]) -> list[Item]:
    """Return one item per shape: the rivals, with ours beside them; and for an absent one an item that says why."""
    rivals.register()
    absent = {name: reason for name in PEERS if (reason := rivals.available(name))}
    # One that was carried here and cannot be called was asked for.
    found = [
        Item(name, lambda reason=reason: {"ok": reason == rivals.ABSENT, "skipped": reason, "error": reason})
        for name, reason in absent.items()
    ]
    present = set(PEERS) - absent.keys()
    if present:
        found += [_item(plan, shape, {*present, "bare"}, rates) for shape in plan.shapes()]
    return found


def compiled_items(plan: Plan, rates: dict[str, Any]) -> list[Item]:
    """Return one item per shape: Hugging Face's code through `torch.compile`, with ours beside it."""
    register_compiled()
    shapes = [shape for shape in plan.shapes() if not plan.small or shape.length == min(plan.lengths)]
    return [_item(plan, shape, {"compiled", "bare"}, rates) for shape in shapes]


def register_compiled() -> None:
    """Make Hugging Face's code through `torch.compile` a candidate."""
    CORES["compiled"] = partial(hugging_face_core, compiled=True)


def _others(plan: Plan) -> set[str]:
    """Return the other backends that are asked for, and Triton's, as candidates under their own names."""
    timed = Case(nq=1, dtype=getattr(torch, plan.dtype))
    wanted = {*asked(plan), *({"triton"} if plan.device != "cpu" else ())} - {plan.backend}
    found = {name for name in wanted if is_for(name, timed)}
    for name in found:
        CORES[name] = partial(our_core, backend=name)
    return found


def _item(plan: Plan, shape: Shape, names: set[str], rates: dict[str, Any]) -> Item:
    wanted = names & set(plan.candidates) if plan.candidates else names
    direction = "forward + backward" if shape.backward else "forward"
    return Item(f"{direction} {shape.label}", lambda: _measure(plan, shape, sorted(wanted), rates))


def _measure(plan: Plan, shape: Shape, names: list[str], rates: dict[str, Any]) -> dict[str, Any]:
    """Check, weigh and time the candidates of one shape; what fails is left out with its reason."""
    record: dict[str, Any] = {**shape.__dict__, "label": shape.label, "asked": names, "reasons": {}, "memory": {}}
    scores = SMALL_SCORES
    if plan.device != "cpu":
        only_flash()
        scores = torch.cuda.get_device_properties(0).total_memory // ORACLE_BYTES
    checks = check_candidates(shape, names, plan.backend, plan.device, scores)
    record["checks"] = {name: check.as_json() for name, check in checks.items()}
    free_memory(plan.device)
    for name, check in checks.items():
        if not check.ok:
            record["reasons"][name] = reason_of(check.text)
    calls = candidates(shape, frozenset(names) - record["reasons"].keys(), plan.backend, plan.device)
    for name, call in list(calls.items()):
        try:
            record["memory"][name] = peak_memory(plan.device, call)
        except Exception as error:  # its reason stands in the record, the others are still timed
            record["reasons"][name] = reason_of(f"{type(error).__name__}: {error}")
            del calls[name]
        free_memory(plan.device)
    pace = Pace(rounds=25, least=5, seconds=plan.seconds * len(calls), block=0.003 if plan.smoke else 0.006)
    samples = interleave(calls, pace, Clock(plan.device).block) if calls else {}
    record["samples"] = {name: one.as_json() for name, one in samples.items()}
    record["floor"] = floor(shape, rates)
    wrong = [name for name, reason in record["reasons"].items() if reason.startswith("wrong")]
    ours_failed = [name for name in record["reasons"] if name in ("bare", "triton", "cuda")]
    record["ok"] = not ours_failed
    record["text"] = "; ".join(f"{name}: {record['reasons'][name]}" for name in {*wrong, *ours_failed})
    del calls
    free_memory(plan.device)
    return record


def reason_of(text: str) -> str:
    """Return why a candidate has no time: out of memory, an error, or a wrong answer."""
    if "OutOfMemory" in text or "out of memory" in text:
        return "out of memory"
    return f"failed: {text[:400]}" if "Error" in text.split("\n", maxsplit=1)[0] else f"wrong: {text[:800]}"


def only_flash() -> None:
    """Let SDPA take its flash kernel or fail: what is compared with must not be another one."""
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
