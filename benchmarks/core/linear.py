"""Time the linear layers of v3-base by number of tokens: the native library, oneDNN and PyTorch, correct first.

python -m benchmarks linear          float32, and bfloat16 where the processor has instructions; 4 minutes

What `deberta_kernels.linear.products` chooses was chosen by this. Weights rotate through 48 MB, so they come from
memory as in a model. One number is the time of all linear layers of one encoder layer. oneDNN's is that of an operator
private to PyTorch, which no model runs: it errs more than the budget allows, and is here as a yardstick of speed. In
bfloat16 it is PyTorch's own product without the operators around it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import record, tables
from benchmarks.harness.arguments import numbers
from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.figures import Line
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.work import GEOMETRY, needed_flops
from benchmarks.registry import LINEAR_FIGURES, LINEAR_TOKENS
from deberta_kernels import dtypes, env, native
from deberta_kernels.linear import products
from deberta_kernels.proof.budget import MEAN_FACTOR, allowance

# (in, out, GELU, how many in an encoder layer)
_WIDE, _WIDER = GEOMETRY.hidden, GEOMETRY.intermediate
LAYERS = ((_WIDE, _WIDE, False, 4), (_WIDE, _WIDER, True, 1), (_WIDER, _WIDE, False, 1))
ROTATION_BYTES = 48e6
PACE, QUICK_PACE = Pace(rounds=15, seconds=4.0), Pace(rounds=5, least=3, seconds=1.0)
QUICK_TOKENS = (4, 128)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = record.options("linear", __doc__, backend=False)
    parser.add_argument("--tokens", default="", type=numbers, help="numbers of tokens, comma-separated")
    return parser.parse_args(arguments)


def candidates(dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """Return name -> function of x, weight, bias and whether the GELU follows."""

    def pytorch(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        y = functional.linear(x, weight, bias)
        return torch.ops.aten.gelu_.default(y) if gelu else y

    def onednn(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        operator = torch.ops.mkldnn._linear_pointwise.default
        return operator(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")

    found: dict[str, Callable[..., Tensor]] = {"pytorch": pytorch}
    if torch.backends.mkldnn.is_available():
        found["onednn"] = onednn
    if dtype == torch.float32 or env.multiplies_bfloat16(native.library_status()["isa"]):
        found["native"] = products.natively
    return found


def measure(dtype: torch.dtype, tokens: int, run: Run) -> dict[str, Any]:
    """Check and time the linear layers of an encoder layer for one number of tokens."""
    found: dict[str, Any] = {"dtype": dtypes.name(dtype), "tokens": tokens, "red": []}
    found |= {"errors": [], "seconds": {}}
    minima: dict[str, float] = {}
    for inputs, outputs, gelu, count in LAYERS:
        x, bias = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs).to(dtype)
        copies = max(2, round(ROTATION_BYTES / (inputs * outputs * dtype.itemsize)))
        weights = [torch.randn(outputs, inputs).div(inputs**0.5).to(dtype) for _ in range(copies)]
        truth = functional.linear(x.double(), weights[0].double(), bias.double())
        truth = functional.gelu(truth) if gelu else truth
        calls = candidates(dtype)
        errors = {name: (call(x, weights[0], bias, gelu) - truth).abs() for name, call in calls.items()}
        found["errors"].append(
            {name: round(float(e.mean() / errors["pytorch"].mean()), 3) for name, e in errors.items()}
        )
        allowed = allowance(dtype, float(errors["pytorch"].max()), float(truth.abs().max()))
        worst, mean = float(errors.get("native", errors["pytorch"]).max()), found["errors"][-1].get("native", 1.0)
        if worst > allowed or mean > MEAN_FACTOR:
            found["red"].append(f"{inputs} to {outputs}")

        def timed(call: Callable[..., Any], weights: Any = weights, rest: Any = (bias, gelu), x: Any = x) -> Any:
            return lambda index: call(x, weights[index % len(weights)], *rest)

        samples = interleave({k: timed(call) for k, call in calls.items()}, QUICK_PACE if run.quick else PACE)
        for name, sample in samples.items():
            median, minimum = run.pick(sample.as_json())
            found["seconds"][name] = found["seconds"].get(name, 0.0) + count * median
            minima[name] = minima.get(name, 0.0) + count * minimum
    found["minima"] = minima
    return found


def judged(run: Run, records: list[dict[str, Any]]) -> list[Line]:
    """Return how the native library stands against PyTorch and the highest rate."""
    by_case = {}
    for found in records:
        both = {k: (found["seconds"][k], found["minima"][k]) for k in found["seconds"]}
        samples = {k: {"median": a, "minimum": b, "wall_median": a, "wall_minimum": b} for k, (a, b) in both.items()}
        red = {"ok": not found["red"], "text": ", ".join(found["red"])}
        by_case[found["dtype"], found["tokens"]] = {"checks": {"native": red}, "samples": samples}
    return [
        run.judge(x, by_case.get((x.shape.dtype, x.shape.length)), needed_flops([x.shape.length], "linear"))
        for x in LINEAR_FIGURES
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 where a product is over the error budget."""
    options = parse(arguments)
    torch.set_grad_enabled(False)
    run = Run("linear", options)
    run.measure_rates()
    chosen = options.tokens or (QUICK_TOKENS if options.quick else LINEAR_TOKENS)
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if not products.lacks_products(dtype)]
    shapes = [(dtype, tokens) for dtype in dtypes for tokens in chosen]
    progress = Progress(100 + tokens for _, tokens in shapes)
    records: list[dict[str, Any]] = []
    for dtype, tokens in shapes:
        found = measure(dtype, tokens, run)
        records.append(found)
        times = ", ".join(f"{name} {1e3 * x:.2f} ms" for name, x in found["seconds"].items())
        progress.step(f"{tokens} tokens {found['dtype']}: {times}")
        if found["red"]:
            note(f"RED: {', '.join(found['red'])}")
    run.keep(judged(run, records), records=records)
    print(tables.text(run.result))
    return run.status
