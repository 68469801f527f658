"""Time adapters in v3-base geometry, patched against unpatched: training steps with LoRA, prefixes and prompts in eval.

python -m benchmarks adapters                    AdapterHub where it imports, else PEFT; five minutes
python -m benchmarks adapters --library peft
python -m benchmarks adapters --quick            the two figures that have a bound, few rounds

Before a shape is timed, the outputs of one sample, and in training the gradients of the adapters, are held to the error
budget against float64, without dropout.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import deberta_kernels as dk
from benchmarks.harness import record, tables
from benchmarks.harness.arguments import names
from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.record import Progress, Run
from benchmarks.registry import ADAPTERS, Workload
from deberta_kernels.testing import budget
from deberta_kernels.testing.geometries import settings

METHODS = tuple(dict.fromkeys(workload.method for found in ADAPTERS.values() for workload in found))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = record.options("adapters", __doc__)
    parser.add_argument("--library", choices=tuple(ADAPTERS), help="default: adapters where it imports, else peft")
    parser.add_argument(
        "--only", default="", type=names(METHODS), help=f"methods, comma-separated: {', '.join(METHODS)}"
    )
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; the figures are those of 12")
    return parser.parse_args(arguments)


def _library() -> str:
    try:
        import adapters  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: it is there, and wants another transformers
        return "peft"
    return "adapters"


def build(library: str, layers: int) -> Any:
    """Return the model with every adapter the workloads name, the same weights on every call."""
    import transformers

    torch.manual_seed(0)
    config = transformers.DebertaV2Config(**settings("v3-base", vocab_size=1024, num_hidden_layers=layers))
    if library == "peft":
        import peft

        targets = ["query_proj", "key_proj", "value_proj"]
        model = transformers.DebertaV2Model(config)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False), "lora")
    import adapters

    model = adapters.DebertaV2AdapterModel(config)
    lora = adapters.LoRAConfig(attn_matrices=["q", "k", "v"], init_weights="bert")
    model.add_adapter("lora", config=lora)
    model.add_adapter("prefix", config=adapters.PrefixTuningConfig(prefix_length=30))
    model.add_adapter("prompt", config=adapters.PromptTuningConfig(prompt_length=30))
    model.add_adapter("bottleneck", config="seq_bn")
    return model


def activate(model: Any, workload: Workload) -> Any:
    """Switch the workload's adapter on; in training its parameters alone want gradients."""
    if hasattr(model, "peft_config"):
        model.set_adapter(workload.method)
    elif workload.train:
        model.train_adapter(workload.method)
    else:
        model.set_active_adapters(workload.method)
    return model.train(workload.train)


def step_of(model: Any, workload: Workload, inputs: dict[str, Any]) -> Callable[[int], object]:
    """Return what is timed: a function of a counter."""
    if not workload.train:

        def forward(_: int) -> object:
            with torch.inference_mode():
                return model(**inputs)

        return forward
    # A rate of 0 is the same work, and both models keep the same weights.
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.0)

    def step(_: int) -> object:
        model(**inputs).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return step


def results(model: Any, workload: Workload, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what one sample gives without dropout: its states, and in training the gradients by name."""
    sample = {name: value[:1] for name, value in inputs.items()}
    model.eval()
    with torch.set_grad_enabled(workload.train):
        states = model(**sample).last_hidden_state
    found = {"states": states.detach()}
    if workload.train:
        states.square().sum().backward()
        found.update({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad(set_to_none=True)
    model.train(workload.train)
    return found


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    """Set the dtype of tensors without one of their own, of which AdapterHub makes a few."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(plain: Any, fused: Any, workload: Workload, inputs: dict[str, Any]) -> str:
    """Return what is wrong with the patched model's results; "" when all are within the budget."""
    with default_dtype(torch.float64):
        truth = results(copy.deepcopy(plain).double(), workload, inputs)
    eager, ours = results(plain, workload, inputs), results(fused, workload, inputs)
    # Gradients through the same layers share their scale.
    scale = max((float(x.abs().max()) for name, x in truth.items() if name != "states"), default=1.0)
    for name, exact in truth.items():
        error, theirs = ((x[name].double() - exact).abs().max().item() for x in (ours, eager))
        largest = max(float(exact.abs().max()), 0.0 if name == "states" else scale)
        if not error <= budget.allowance(torch.float32, theirs, largest):
            return f"{name} errs {error:.3g}, eager {theirs:.3g}"
    return ""


def measure(run: Run, plain: Any, fused: Any, workload: Workload) -> dict[str, Any]:
    """Check and time one workload."""
    ids = torch.randint(3, plain.config.vocab_size, (workload.batch, workload.length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = {"eager": activate(plain, workload), "patched": activate(fused, workload)}
    dk.reset_stats()
    wrong = check(plain, fused, workload, inputs)
    text = f"RED: {wrong}" if wrong else "within the budget"
    found = {**workload.__dict__, "check": text, "stats": dk.stats(), "samples": {}}
    if not wrong:
        steps = {name: step_of(model, workload, inputs) for name, model in models.items()}
        samples = interleave(steps, Pace(3, 3, 1.0) if run.quick else Pace(9, 5, 60.0))
        found["samples"] = {name: sample.as_json() for name, sample in samples.items()}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    options = parse(arguments)
    warnings.simplefilter("ignore")
    library = options.library or _library()
    model = f"v3-base, {options.layers} layers, random weights"
    run = Run(f"adapters-{library}", options, model=model, library=library)
    plain, fused = build(library, options.layers), build(library, options.layers)
    dk.patch(fused, backend=run.backend, strict=True)
    run.measure_rates()
    workloads = [x for x in ADAPTERS[library] if (x.must or not run.quick) and x.method in (options.only or METHODS)]
    progress = Progress(x.batch * (1 + 2 * x.train) for x in workloads)
    records, lines = [], []
    for workload in workloads:
        found = measure(run, plain, fused, workload)
        wrong = found["check"].startswith("RED")
        checks = {"patched": {"ok": not wrong, "text": found["check"]}}
        records.append(found)
        lines.append(run.judge(workload.figure, {**found, "checks": checks}, None))
        run.keep(lines, workloads=records)
        progress.step(f"{workload.title}, {workload.label}: {run.times(found['samples']) or found['check']}")
    print(tables.text(run.result))
    return run.status
