"""Whole models timed, patched against unpatched: ragged batches, a training step, one short text under a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.device import Clock, captured, peak_memory
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import Item
from benchmarks.harness.clock import Pace, interleave
from deberta_kernels import notices
from deberta_kernels.testing.geometries import settings

__all__ = ["items"]

SIZES = ("v3-base", "v3-large")
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def items(plan: Plan) -> list[Item]:
    """Return the whole-model measurements."""
    batch, length = (4, 48) if plan.small else (32, 512)
    found = []
    for name in SIZES:
        found.append(Item(f"{name} {batch} ragged to {length}", lambda name=name: _ragged(plan, name, batch, length)))
    found.append(Item(f"v3-base training step {batch // 2}x{length}", lambda: _training(plan, batch // 2, length)))
    if not plan.small:
        found.append(Item("v3-base 1x128 under a CUDA graph", lambda: _graph(plan)))
    return found


def _pair(plan: Plan, name: str, *, training: bool = False, unpad: Any = "auto") -> tuple[nn.Module, nn.Module]:
    from transformers import DebertaV2Config, DebertaV2Model

    import deberta_kernels

    torch.manual_seed(0)
    chosen = settings(name, vocab_size=1024, **(TINY if plan.small else {}))
    plain = DebertaV2Model(DebertaV2Config(**chosen)).to(plan.device, getattr(torch, plan.dtype)).train(training)
    patched = copy.deepcopy(plain)
    deberta_kernels.patch(patched, backend=plan.backend, strict=True, unpad=unpad)
    notices.reset_stats()
    return plain, patched


def _texts(plan: Plan, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask of texts whose lengths spread as those of a mixed corpus do: many short, few long."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(batch, generator=generator).mul(0.8).add(4.6).exp().long().clamp(8, length)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(1, 1024, (batch, length), generator=generator).where(mask, 0)
    return ids.to(plan.device), mask.to(plan.device)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor) -> Callable[[int], Tensor]:
    def run(_: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(input_ids=ids, attention_mask=mask)[0]
        return out

    return run


def _ran(plan: Plan) -> str:
    """Return "" when the backend of the run has computed all calls of the patched model, else what happened."""
    stats = notices.stats()
    calls = {name: count for name, count in stats["calls"].items() if count}
    if set(calls) == {plan.backend} and not stats["fallbacks"]:
        return ""
    return f"backend {plan.backend} did not run every call: calls {calls}, original code {stats['fallbacks']}"


def _compared(plan: Plan, plain: nn.Module, patched: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Hold the patched model to twice the error of the plain one in the same dtype, on real tokens, against float32."""
    exact = _forward(copy.deepcopy(plain).float(), ids, mask)(0)
    errors = [(_forward(model, ids, mask)(0).float() - exact)[mask.bool()].abs() for model in (plain, patched)]
    theirs, ours = (float(error.mean()) for error in errors)
    elsewhere = _ran(plan)
    ok = ours <= 2 * theirs + 1e-5 and not elsewhere
    return {"ok": ok, "text": elsewhere, "mean_error": ours, "mean_error_unpatched": theirs}


def _timed(plan: Plan, calls: dict[str, Callable[[int], Any]]) -> dict[str, Any]:
    memory = {name: peak_memory(plan.device, call) for name, call in calls.items()}
    pace = Pace(rounds=15, least=3, seconds=plan.seconds * 3, block=0.02)
    samples = interleave(calls, pace, Clock(plan.device).block)
    return {"samples": {name: one.as_json() for name, one in samples.items()}, "memory": memory}


def _ragged(plan: Plan, name: str, batch: int, length: int) -> dict[str, Any]:
    plain, patched = _pair(plan, name)
    ids, mask = _texts(plan, batch, length)
    check = _compared(plan, plain, patched, ids, mask)
    calls = {"unpatched": _forward(plain, ids, mask), "patched": _forward(patched, ids, mask)}
    return {**check, "fill": round(float(mask.float().mean()), 3), **_timed(plan, calls)}


def _training(plan: Plan, batch: int, length: int) -> dict[str, Any]:
    plain, patched = _pair(plan, "v3-base", training=True)
    ids, mask = _texts(plan, batch, length)

    def step(model: nn.Module) -> Callable[[int], None]:
        def run(_: int) -> None:
            model.zero_grad(set_to_none=True)
            model(input_ids=ids, attention_mask=mask)[0].float().square().mean().backward()

        return run

    step(patched)(0)
    gradients = [x.grad for x in patched.parameters() if x.grad is not None]
    wrong = _ran(plan) or (
        "" if gradients and all(bool(x.isfinite().all()) for x in gradients) else "no finite gradients"
    )
    return {"ok": not wrong, "text": wrong, **_timed(plan, {"unpatched": step(plain), "patched": step(patched)})}


def _graph(plan: Plan) -> dict[str, Any]:
    plain, patched = _pair(plan, "v3-base", unpad=False)  # which padding to leave out is read from the device
    ids = torch.randint(1, 1024, (1, 128), device=plan.device)
    mask = torch.ones_like(ids)
    expected = _forward(patched, ids, mask)(0)
    calls = {"unpatched": _forward(plain, ids, mask), "patched": _forward(patched, ids, mask)}
    calls["patched, compiled to a graph"], out = _replayed(calls["patched"])
    calls["patched, compiled to a graph"](0)
    elsewhere = _ran(plan)
    check: dict[str, Any] = {"ok": torch.equal(out, expected) and not elsewhere, "text": elsewhere}
    try:
        calls["unpatched, compiled to a graph"], _ = _replayed(calls["unpatched"])
    except RuntimeError as error:  # the original asks the host for values
        check["unpatched_graph"] = str(error)[:200]
    return {**check, **_timed(plan, calls)}


def _replayed(call: Callable[[int], Tensor]) -> tuple[Callable[[int], Any], Tensor]:
    graph, out = captured(lambda: call(0))
    return lambda _: graph.replay(), out
