"""Check and time training steps of whole models, and turn the times into the lines of the figures table.

A step is: forward with both dropouts, cross entropy, backward, AdamW. All candidates train the same weights in turn.
bfloat16 means autocast; weights, gradients and the optimizer are float32 then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import deberta_kernels
from benchmarks.core.candidates import model_settings
from benchmarks.core.checking import Check
from benchmarks.core.measure import Line, Plan
from benchmarks.harness.clock import Pace, interleave
from benchmarks.model.batches import Batch, ModelShape, draw_batches
from benchmarks.registry import needed_flops_of_model
from deberta_kernels.testing import budget

__all__ = ["TRAIN_SHAPES", "Workshop", "judge_training", "measure_step"]

PACE, QUICK_PACE = Pace(rounds=15, least=5, seconds=120.0), Pace(rounds=3, least=2, seconds=20.0)
# (batch, length): (must, aim) against eager.
FIGURES = {
    "float32": {(8, 128): (1.25, 2.2), (4, 512): (1.6, 2.8)},
    "bfloat16": {(8, 128): (1.3, 2.0), (4, 512): (1.6, 2.5)},
}
TRAIN_SHAPES = tuple(ModelShape(*size, dtype) for dtype, sizes in FIGURES.items() for size in sizes)
# Of a step: products forward, and twice as many backward, for the inputs and for the weights.
PASSES = 3
# What the check runs: one sample of this many tokens, long enough to leave the linear zone of the positions.
CHECKED_TOKENS = 256


@dataclass
class Workshop:
    """Hold what the shapes of one run share: the plan, the model as transformers makes it, and its optimizer."""

    plan: Plan
    plain: Any = field(init=False)
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

        torch.manual_seed(0)
        self.plain = DebertaV2ForSequenceClassification(DebertaV2Config(**model_settings()))
        # A rate that leaves the weights where they are: times must not depend on how far a candidate has trained.
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), 1e-9, fused=True)

    def candidates(self, dtype: str) -> dict[str, Any]:
        """Return name -> model; all share their weights."""
        found = {"eager": self.plain, "patched": self._patched("auto")}
        if dtype == "float32":
            found["native"] = self._patched(True)
        return found

    def _patched(self, fast_linears: bool | str) -> Any:
        shared: dict[int, Any] = {id(x): x for x in (*self.plain.parameters(), *self.plain.buffers())}
        model = copy.deepcopy(self.plain, shared)
        deberta_kernels.patch(model, backend=self.plan.backend, strict=True, fast_linears=fast_linears)
        return model


def _loss(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    labels = torch.arange(len(batch.input_ids)) % 2
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    return loss


def _gradients(model: nn.Module, batch: Batch, dtype: str) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model, batch, dtype).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def _check(models: dict[str, Any], shape: ModelShape) -> dict[str, Check]:
    """Hold the gradients of every module, without dropout, to the error budget against float64.

    The largest error in a module counts relative to its largest gradient. Weight and bias are taken together: softmax
    does not see a shift of all keys, so the gradient of their bias is what is left when nearly all of it cancels.
    """
    batch = draw_batches(ModelShape(1, CHECKED_TOKENS, shape.dtype), models["eager"].config.vocab_size, 1)[0]
    for model in models.values():
        model.eval()
    truth = _gradients(copy.deepcopy(models["eager"]).double(), batch, "float64")
    factor, relative = budget.LIMITS[getattr(torch, shape.dtype)]

    def error(model: nn.Module) -> float:
        found = _gradients(model, batch, shape.dtype)
        errors: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for name, exact in truth.items():
            module = name.rpartition(".")[0]
            errors[module] = max(errors.get(module, 0.0), float((found[name] - exact).abs().max()))
            sizes[module] = max(sizes.get(module, 0.0), float(exact.abs().max()))
        return max(errors[module] / sizes[module] for module in errors)

    allowed = factor * (error(models["eager"]) + relative)
    checks = {}
    for name, model in models.items():
        if name != "eager":
            found = error(model)
            text = f"largest relative error of a module's gradients {found:.2e}, allowed {allowed:.2e}"
            checks[name] = Check(found <= allowed, text, found / allowed)
    for model in models.values():
        model.train().zero_grad()
    return checks


def measure_step(workshop: Workshop, shape: ModelShape) -> dict[str, Any]:
    """Check and time every candidate of one shape."""
    plan, title = workshop.plan, f"{shape.label} {shape.dtype}"
    models = workshop.candidates(shape.dtype)
    record: dict[str, Any] = {**shape.__dict__, "label": shape.label, "checks": {}}
    for name, check in _check(models, shape).items():
        plan.note(f"{title}: {name}: {check.text}")
        record["checks"][name] = {**check.as_json(), "text": check.text}
        if not check.ok:
            del models[name]
    batches = draw_batches(shape, workshop.plain.config.vocab_size)
    record["needed_gflop"] = PASSES * needed_flops_of_model([shape.length] * shape.batch) / 1e9

    def step(model: nn.Module) -> Callable[[int], object]:
        def run(index: int) -> None:
            workshop.optimizer.zero_grad()
            _loss(model, batches[index % len(batches)], shape.dtype).backward()
            workshop.optimizer.step()

        return run

    samples = interleave({name: step(model) for name, model in models.items()}, QUICK_PACE if plan.quick else PACE)
    record["samples"] = {name: x.as_json() for name, x in samples.items()}
    times = (f"{name} {plan.pick(x)[0]:.2f}" for name, x in record["samples"].items())
    plan.note(f"{title}, s: {', '.join(times)}")
    return record


def judge_training(
    records: list[dict[str, Any]],
    pick: Callable[[dict[str, Any]], tuple[float, float]],
    rates: dict[str, float | None],
) -> list[Line]:
    """Return the lines of all figures; `at_peak` is a step of nothing but products at the highest rate seen."""
    lines = []
    for name, title in (("patched", "PyTorch's linears"), ("native", "native linears")):
        for record in records:
            dtype, size = record["dtype"], (record["batch"], record["length"])
            must, aim = FIGURES[dtype][size]
            if dtype == "bfloat16" and name == "native":
                continue
            # In float32 the aim is for native ones.
            head = (dtype, f"training step, times faster than eager, {dtype}, {title}", record["label"], must)
            line = (*head, aim if name == "native" or dtype == "bfloat16" else None, True, "x")
            if name not in record["samples"]:
                lines.append(Line(*line, reason=f"RED: {record['checks'][name]['text']}"))
                continue
            ours, eager = (pick(record["samples"][x]) for x in (name, "eager"))
            rate = max((rate or 0.0) for key, rate in rates.items() if key.endswith(dtype))
            shortest = record["needed_gflop"] / rate if rate else None
            at_peak = eager[1] / shortest if shortest and shortest <= ours[1] else None
            lines.append(Line(*line, median=eager[0] / ours[0], best=eager[1] / ours[1], at_peak=at_peak))
    return lines
