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
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LIBRARIES = ("adapters", "peft")


@dataclass(frozen=True)
class Workload:
    """Say what is timed.

    Attributes:
        method: name of an adapter of the model.
        title: what the table says of it.
        batch: samples.
        length: tokens of each, all of them real.
        train: forward, backward and an optimizer's step of the adapter; False: a forward under inference_mode.
        must: speed-up that has to be reached, or None.
    """

    method: str
    title: str
    batch: int
    length: int
    train: bool
    must: float | None = None

    @property
    def case(self) -> str:
        """Return the shape and what is done."""
        return f"{self.batch}x{self.length} float32, {'training step' if self.train else 'eval'}"


LORA, PREFIX = "LoRA on q, k, v, rank 8", "prefix tuning, 30 tokens"
WORKLOADS = {
    "adapters": (
        Workload("prefix", PREFIX, 1, 512, False, 1.5),
        Workload("lora", LORA, 4, 512, True, 1.5),
        Workload("lora", LORA, 1, 512, False),
        Workload("prompt", "prompt tuning, 30 tokens", 1, 512, False),
        Workload("bottleneck", "seq_bn", 1, 128, False),
    ),
    "peft": (Workload("lora", LORA, 4, 512, True, 1.5), Workload("lora", LORA, 1, 512, False)),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, help="default: adapters where it imports, else peft")
    parser.add_argument("--quick", action="store_true", help="the figures that have a bound, with few rounds")
    parser.add_argument("--only", default="", help="methods, comma-separated: lora, prefix, prompt, bottleneck")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; the figures are those of 12")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/; '-': nowhere")
    parser.add_argument("--backend", default="cpu", help="which backend is ours: cpu, torch or reference")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a figure misses its must")
    return parser.parse_args(arguments)


def build(library: str, layers: int) -> Any:
    """Return the model with every adapter the workloads name, the same weights on every call."""
    import torch
    import transformers

    from benchmarks.core.candidates import model_settings

    torch.manual_seed(0)
    config = transformers.DebertaV2Config(**{**model_settings(), "num_hidden_layers": layers})
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
    """Let the workload's adapter act, and its parameters alone want gradients in training."""
    if hasattr(model, "peft_config"):
        model.set_adapter(workload.method)
    elif workload.train:
        model.train_adapter(workload.method)
    else:
        model.set_active_adapters(workload.method)
    return model.train(workload.train)


def step_of(model: Any, workload: Workload, inputs: dict[str, Any]) -> Callable[[int], object]:
    """Return what is timed: a function of a counter."""
    import torch

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
    import torch

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
    """Let tensors without a dtype of their own, of which AdapterHub makes a few, have this one."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(plain: Any, fused: Any, workload: Workload, inputs: dict[str, Any]) -> str:
    """Return what is wrong with the patched model's results; "" when all are within the budget."""
    import torch

    from deberta_kernels.testing import budget

    factor, relative = budget.LIMITS[torch.float32]
    with default_dtype(torch.float64):
        truth = results(copy.deepcopy(plain).double(), workload, inputs)
    eager, ours = results(plain, workload, inputs), results(fused, workload, inputs)
    # Gradients through the same layers share their scale.
    scale = max([1.0, *(float(x.abs().max()) for name, x in truth.items() if name != "states")])
    for name, exact in truth.items():
        error, allowed = ((x[name].double() - exact).abs().max().item() for x in (ours, eager))
        floor = relative * max(float(exact.abs().max()), 1.0 if name == "states" else scale)
        if not error <= factor * (allowed + floor):
            return f"RED: {name} errs {error:.3g}, eager {allowed:.3g}"
    return ""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Check and time every workload; return what the JSON file holds."""
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    import deberta_kernels as dk
    from benchmarks.core.measure import Line
    from benchmarks.harness import machine
    from benchmarks.harness.clock import Pace, interleave
    from benchmarks.harness.record import note, preamble

    started = time.perf_counter()
    result = preamble(f"adapters-{options.library}", 1, options.backend, quick=options.quick)
    result["settings"].update(model=f"v3-base, {options.layers} layers, random weights", library=options.library)
    plain, fused = build(options.library, options.layers), build(options.library, options.layers)
    dk.patch(fused, backend=options.backend, strict=True)
    result["rates_gflops"] = machine.rates(Pace(5, 3, 2.0))
    result["workloads"], lines = [], []
    methods = set(filter(None, options.only.split(",")))
    for workload in WORKLOADS[options.library]:
        if (options.quick and workload.must is None) or (methods and workload.method not in methods):
            continue
        ids = torch.randint(3, plain.config.vocab_size, (workload.batch, workload.length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        models = {"eager": activate(plain, workload), "patched": activate(fused, workload)}
        dk.reset_stats()
        wrong = check(plain, fused, workload, inputs)
        record = {**workload.__dict__, "check": wrong or "within the budget", "stats": dk.stats(), "samples": {}}
        values: dict[str, Any] = {"reason": wrong}
        if not wrong:
            steps = {name: step_of(model, workload, inputs) for name, model in models.items()}
            pace = Pace(3, 3, 1.0) if options.quick else Pace(9, 5, 60.0)
            samples = interleave(steps, pace)
            record["samples"] = {name: sample.as_json() for name, sample in samples.items()}
            eager, ours = samples["eager"], samples["patched"]
            values = {"median": eager.median / ours.median, "best": eager.minimum / ours.minimum}
        lines.append(Line("adapters", workload.title, workload.case, workload.must, None, True, "x", **values))
        result["workloads"].append(record)
        note(f"{workload.title}, {workload.case}: {wrong or '{median:.2f}x, minima {best:.2f}x'.format(**values)}")
    result["figures"] = [line.as_json() for line in lines]
    result["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    options = parse(arguments)
    # Before torch starts its threads: an idle one that spins would count as CPU time.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    from benchmarks.harness.record import store
    from benchmarks.report import table

    if options.library is None:
        try:
            import adapters  # noqa: F401

            options.library = "adapters"
        except (ImportError, RuntimeError):
            options.library = "peft"
    result = measure(options)
    print(table(result))
    store(result, options.json)
    verdicts = {figure["verdict"] for figure in result["figures"]}
    return int("RED" in verdicts or (options.strict and "MISSED" in verdicts))
