"""`torch.compile` and CUDA graphs on the device: the operators, a patched model, and a first call inside a capture."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.core.checking import worst
from benchmarks.gpu.device import captured, free_memory
from benchmarks.gpu.models import TINY
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import Item
from deberta_kernels import dropout
from deberta_kernels.api import run_attention
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.geometries import settings
from deberta_kernels.testing.inputs import Case
from deberta_kernels.torch_state.captures import CaptureError
from deberta_kernels.types import AttentionProblem

__all__ = ["items"]

MODES = ("default", "reduce-overhead")
# The second call records a CUDA graph, later ones replay it.
CALLS = 4


def items(plan: Plan) -> list[Item]:
    """Return the checks; what only a device can do is left out without one."""
    cases = [Case(nq=200, dtype=torch.bfloat16, mask="right_tokens"), Case(nq=150, dtype=torch.bfloat16, packed=True)]
    if plan.small:
        cases = [replace(case, nq=40, heads=2, head_dim=32) for case in cases[:1]]
    found = []
    if not plan.small:  # before anything else has been loaded or kept
        found.append(Item("a first call inside a capture", lambda: _first_call(plan)))
        found.append(Item("graph: forward and backward of a patched model", lambda: _graph(plan)))
    for mode in MODES[:1] if plan.small else MODES:
        found += [Item(f"{mode}: {c.id}", lambda mode=mode, c=c: _compilable(_operator, plan, mode, c)) for c in cases]
        found.append(Item(f"{mode}: patched model", lambda mode=mode: _compilable(_model, plan, mode)))
    return found


def _compilable(check: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return {"ok": True, "skipped": "torch.compile needs a C++ compiler"}
    torch._dynamo.reset()
    skipped = torch._dynamo.utils.counters["inductor"]
    before = skipped["cudagraph_skips"]
    result = check(*arguments)
    if skipped["cudagraph_skips"] > before:
        result = {**result, "ok": False, "text": f"{result.get('text', '')} torch.compile left CUDA graphs out"}
    return result


def _options(mode: str) -> dict[str, Any]:
    return {} if mode == "default" else {"mode": mode}


def _attention(
    backend: str, problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    return run_attention(  # type: ignore[return-value]
        q, k, v, *tables, masks=problem.masks, position=problem.position, scale=problem.scale,
        dropout_p=problem.dropout_p, cu_seqlens=problem.cu_seqlens, max_seqlen=problem.max_seqlen, return_lse=True,
        backend=backend,
    )  # fmt: skip


def _operator(plan: Plan, mode: str, case: Case) -> dict[str, Any]:
    """Hold the compiled operator, forward and backward, to the budget, on other values at every call."""
    first = inputs.problem(case, plan.device)
    first_dout, largest, wrong = inputs.dout(case, first), 0.0, ""
    compiled = torch.compile(lambda *x: _attention(plan.backend, first, *x), **_options(mode))

    def run(p: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, lse = compiled(p.q, p.k, p.v, (p.pos_key, p.pos_query))
        return out, lse

    for index in range(CALLS):
        # Masks and bounds stay; a graph has to copy in the rest.
        problem = replace(first, q=first.q.roll(index, 2), k=first.k.roll(-index, 2), v=first.v.roll(index, 2))
        dout = first_dout.roll(-index, 2)
        against = budget.truth(problem, dout)
        torch.compiler.cudagraph_mark_step_begin()
        found = {name: x.clone() for name, x in budget.evaluate(run, problem, dout).items()}
        report = budget.measure(found, against, f"{mode} {case.id}, call {index}")
        largest, wrong = max(largest, worst(report)), wrong or ("" if report.ok else str(report))
    free_memory(plan.device)
    return {"ok": not wrong, "worst_of_allowed": round(largest, 4), "text": wrong}


def _pair(plan: Plan) -> tuple[nn.Module, nn.Module]:
    """Return two layers of v3-base and the same patched, without dropout, to be differentiated."""
    from transformers import DebertaV2Config, DebertaV2Model

    import deberta_kernels

    torch.manual_seed(0)
    chosen = settings("v3-base", **{"vocab_size": 1024, **(TINY if plan.small else {}), "num_hidden_layers": 2})
    chosen |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = DebertaV2Model(DebertaV2Config(**chosen)).to(plan.device, getattr(torch, plan.dtype)).train()
    patched = copy.deepcopy(plain)
    # Which padding to leave out is read from the device.
    deberta_kernels.patch(patched, backend=plan.backend, strict=True, unpad=False)
    return plain, patched


def _batch(plan: Plan, seed: int) -> tuple[Tensor, Tensor]:
    batch, length = (2, 24) if plan.small else (8, 256)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < lengths
    ids = torch.randint(1, 1024, (batch, length), generator=generator).where(mask, 0)
    return ids.to(plan.device), mask.to(plan.device)


def _step(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the states of real tokens and the gradients of the first layer's attention."""
    states: Tensor = model(input_ids=ids, attention_mask=mask)[0]
    real = states * mask.unsqueeze(-1)
    names = ("query_proj", "key_proj", "value_proj")
    weights = {name: x for name, x in model.named_parameters() if ".layer.0." in name and any(n in name for n in names)}
    gradients = torch.autograd.grad(real.float().square().mean(), list(weights.values()))
    return {"states": real.detach(), **dict(zip((name.split(".layer.")[1] for name in weights), gradients))}


def _held(plan: Plan, plain: nn.Module, seed: int, found: dict[str, Tensor]) -> dict[str, Any]:
    """Hold a step to twice the error of the unpatched model in the same dtype, gradients to three times it."""
    exact = _step(copy.deepcopy(plain).double(), *_batch(plan, seed))
    theirs = _step(plain, *_batch(plan, seed))
    largest, wrong = 0.0, []
    for (name, truth), allowed, ours in zip(exact.items(), theirs.values(), found.values(), strict=True):
        scale = truth.abs().max() * torch.finfo(ours.dtype).eps
        limit = (2 if name == "states" else 3) * (allowed.double() - truth).abs().mean() + scale
        share = float((ours.double() - truth).abs().mean() / limit)
        largest = max(largest, share)
        if not share <= 1:
            wrong.append(f"seed {seed}, {name}: {share:.2f} of what is allowed")
    return {"ok": not wrong, "worst_of_allowed": round(largest, 4), "text": "; ".join(wrong)}


def _worst(results: list[dict[str, Any]]) -> dict[str, Any]:
    return max(results, key=lambda result: (not result["ok"], result["worst_of_allowed"]))


def _model(plan: Plan, mode: str) -> dict[str, Any]:
    plain, patched = _pair(plan)
    # Inductor takes a minute to make C++ of two layers.
    compiled = torch.compile(patched, backend="aot_eager") if plan.small else torch.compile(patched, **_options(mode))
    results = []
    for seed in range(CALLS):
        torch.compiler.cudagraph_mark_step_begin()
        found = {name: x.clone() for name, x in _step(compiled, *_batch(plan, seed)).items()}
        results.append(_held(plan, plain, seed, found))
    free_memory(plan.device)
    return _worst(results)


def _graph(plan: Plan) -> dict[str, Any]:
    """Capture a step of a patched model, and replay it on other texts."""
    plain, patched = _pair(plan)
    ids, mask = _batch(plan, 0)
    graph, found = captured(lambda: _step(patched, ids, mask))
    results = []
    for seed in range(CALLS):
        for held, other in zip((ids, mask), _batch(plan, seed), strict=True):
            held.copy_(other)
        graph.replay()
        results.append(_held(plan, plain, seed, found))
    return _worst(results)


def _first_call(plan: Plan) -> dict[str, Any]:
    """Capture before any call: refused by name, the device unharmed, and right after one call outside."""
    case = Case(nq=77, head_dim=64, dtype=torch.float16, mask="right")
    problem = inputs.problem(case, plan.device)
    dout = inputs.dout(case, problem)
    dropout.draw_seed(problem.q.device)  # PyTorch's own first use of its generator

    def step() -> dict[str, Tensor]:
        return budget.evaluate(
            lambda p: _attention(plan.backend, p, p.q, p.k, p.v, (p.pos_key, p.pos_query)), problem, dout
        )

    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()
        return {"ok": False, "text": "the capture went on: something was loaded before, or inside it"}
    except CaptureError as error:
        refused = str(error)
    against = budget.truth(problem, dout)
    eager = budget.measure(step(), against, "after the refusal")
    graph, found = captured(step)
    graph.replay()
    replayed = budget.measure(found, against, "replayed")
    wrong = [str(report) for report in (eager, replayed) if not report.ok]
    return {"ok": not wrong, "refused": refused, "text": "; ".join(wrong)}
