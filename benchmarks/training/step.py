"""Time a training step of the whole model: patched, with PyTorch's and with native linear layers, against eager.

python -m benchmarks train            v3-base geometry, both dtypes; 15 minutes for each number of threads
python -m benchmarks train --quick    fewer rounds; 5 minutes

A step is: forward with both dropouts, cross entropy, backward, AdamW. All candidates train the same weights in turn.
bfloat16 means autocast; weights, gradients and the optimizer are float32 then.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.core.checking import Check
from benchmarks.harness import record, tables
from benchmarks.harness.arguments import names
from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.figures import Line
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.work import needed_flops
from benchmarks.model.batches import Batch, draw_batches
from benchmarks.model.rivals import patched
from benchmarks.registry import CANDIDATES, DTYPES, TRAIN_FIGURES, TRAIN_SHAPES, ModelShape
from deberta_kernels.testing import budget
from deberta_kernels.testing.geometries import settings

__all__ = ["judged", "main"]

PACE, QUICK_PACE = Pace(rounds=15, least=5, seconds=120.0), Pace(rounds=3, least=2, seconds=20.0)
# What the check runs: one sample of this many tokens, long enough to leave the linear zone of the positions.
CHECKED_TOKENS = 256
SIZES = tuple(dict.fromkeys(shape.label for shape in TRAIN_SHAPES))
FAST_LINEARS = {"patched": "auto", "native": True}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = record.options("train", __doc__)
    parser.add_argument("--only", default="", type=names(DTYPES), help=f"dtypes, comma-separated: {', '.join(DTYPES)}")
    parser.add_argument("--sizes", default="", type=names(SIZES), help=f"batches, comma-separated: {', '.join(SIZES)}")
    return parser.parse_args(arguments)


class Training:
    """The model as transformers makes it, its optimizer, and the candidates that share its weights."""

    def __init__(self, backend: str) -> None:
        from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

        torch.manual_seed(0)
        self.plain = DebertaV2ForSequenceClassification(DebertaV2Config(**settings("v3-base", vocab_size=1024)))
        self._backend = backend
        # A rate that leaves the weights where they are: times must not depend on how far a candidate has trained.
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), 1e-9, fused=True)

    def candidates(self, dtype: str) -> dict[str, Any]:
        """Return name -> model; all share their weights."""
        wanted = {name for name, x in CANDIDATES["train"].items() if not x.dtypes or dtype in x.dtypes}
        found = {"eager": self.plain}
        for name in FAST_LINEARS:
            if name in wanted:
                found[name] = patched(self.plain, self._backend, fast_linears=FAST_LINEARS[name])
        return found


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

    def error(model: nn.Module) -> float:
        found = _gradients(model, batch, shape.dtype)
        errors: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for name, exact in truth.items():
            module = name.rpartition(".")[0]
            errors[module] = max(errors.get(module, 0.0), float((found[name] - exact).abs().max()))
            sizes[module] = max(sizes.get(module, 0.0), float(exact.abs().max()))
        return max(errors[module] / sizes[module] for module in errors)

    allowed = budget.allowance(getattr(torch, shape.dtype), error(models["eager"]))
    checks = {}
    for name, model in models.items():
        if name != "eager":
            found = error(model)
            text = f"largest relative error of a module's gradients {found:.2e}, allowed {allowed:.2e}"
            checks[name] = Check(found <= allowed, text, found / allowed)
    for model in models.values():
        model.train().zero_grad()
    return checks


def measure_step(run: Run, training: Training, shape: ModelShape) -> dict[str, Any]:
    """Check and time every candidate of one shape."""
    models = training.candidates(shape.dtype)
    found: dict[str, Any] = {**shape.__dict__, "label": shape.label, "checks": {}}
    for name, check in _check(models, shape).items():
        note(f"{shape.label} {shape.dtype}: {name}: {check.text}")
        found["checks"][name] = {**check.as_json(), "text": check.text}
        if not check.ok:
            del models[name]
    batches = draw_batches(shape, training.plain.config.vocab_size)
    found["needed_gflop"] = needed_flops([shape.length] * shape.batch, "step") / 1e9

    def step(model: nn.Module) -> Callable[[int], object]:
        def call(index: int) -> None:
            training.optimizer.zero_grad()
            _loss(model, batches[index % len(batches)], shape.dtype).backward()
            training.optimizer.step()

        return call

    samples = interleave({name: step(model) for name, model in models.items()}, QUICK_PACE if run.quick else PACE)
    found["samples"] = {name: sample.as_json() for name, sample in samples.items()}
    return found


def judged(run: Run, records: list[dict[str, Any]]) -> list[Line]:
    """Return the lines of the figures of the shapes that were measured."""
    by_shape = {(found["label"], found["dtype"]): found for found in records}
    pairs = [(figure, by_shape.get((figure.shape.label, figure.shape.dtype))) for figure in TRAIN_FIGURES]
    return [run.judge(figure, found, 1e9 * found["needed_gflop"]) for figure, found in pairs if found]


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    options = parse(arguments)
    run = Run("train", options)
    run.measure_rates()
    shapes = [s for s in TRAIN_SHAPES if s.dtype in (options.only or DTYPES) and s.label in (options.sizes or SIZES)]
    training = Training(run.backend)
    progress = Progress(1.0 for _ in shapes)
    records: list[dict[str, Any]] = []
    for shape in shapes:
        records.append(measure_step(run, training, shape))
        run.keep(judged(run, records), steps=records, complete=len(records) == len(shapes))
        progress.step(f"{shape.label} {shape.dtype}: {run.times(records[-1]['samples'])}")
    print(tables.text(run.result))
    return run.status
