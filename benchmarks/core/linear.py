"""Time the linear layers of v3-base by number of tokens: the native library, oneDNN and PyTorch, correct first.

python -m benchmarks linear          float32, and bfloat16 where the processor has instructions; 4 minutes

What `deberta_kernels.linear.products` chooses was chosen by this. Weights rotate through 48 MB, so they come from
memory as in a model. One number is the time of all linear layers of one encoder layer. oneDNN's is that of an operator
private to PyTorch, which no model runs: it errs more than the budget allows, and is here as a yardstick of speed. In
bfloat16 it is PyTorch's own product without the operators around it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

# (in, out, GELU, how many in an encoder layer)
LAYERS = ((768, 768, False, 4), (768, 3072, True, 1), (3072, 768, False, 1))
TOKENS = (4, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048)
ROTATION_BYTES = 48e6


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens, comma-separated")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/; '-': nowhere")
    return parser.parse_args(arguments)


def candidates(dtype: Any) -> dict[str, Callable[..., Any]]:
    """Return name -> function of x, weight, bias and whether the GELU follows."""
    import torch
    from torch.nn import functional

    from deberta_kernels import native
    from deberta_kernels.linear import products

    def pytorch(x: Any, weight: Any, bias: Any, gelu: bool) -> Any:
        y = functional.linear(x, weight, bias)
        return torch.ops.aten.gelu_.default(y) if gelu else y

    def onednn(x: Any, weight: Any, bias: Any, gelu: bool) -> Any:
        operator = torch.ops.mkldnn._linear_pointwise.default
        return operator(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")

    found: dict[str, Callable[..., Any]] = {"pytorch": pytorch}
    if torch.backends.mkldnn.is_available():
        found["onednn"] = onednn
    isa = native.library_status()["isa"]
    if dtype == torch.float32 or isa == "avx512_bf16":
        found["native"] = products.natively
    return found


def measure(dtype: Any, tokens: int) -> dict[str, Any]:
    """Check and time the linear layers of an encoder layer for one number of tokens."""
    import torch
    from torch.nn import functional

    from benchmarks.harness.clock import Pace, interleave
    from deberta_kernels.testing.budget import LIMITS, MEAN_FACTOR

    record: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "red": []}
    record |= {"errors": [], "seconds": {}}
    for inputs, outputs, gelu, count in LAYERS:
        x, bias = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs).to(dtype)
        copies = max(2, round(ROTATION_BYTES / (inputs * outputs * dtype.itemsize)))
        weights = [torch.randn(outputs, inputs).div(inputs**0.5).to(dtype) for _ in range(copies)]
        truth = functional.linear(x.double(), weights[0].double(), bias.double())
        truth = functional.gelu(truth) if gelu else truth
        calls = candidates(dtype)
        errors = {name: (call(x, weights[0], bias, gelu) - truth).abs() for name, call in calls.items()}
        record["errors"].append(
            {name: round(float(e.mean() / errors["pytorch"].mean()), 3) for name, e in errors.items()}
        )
        factor, floor = LIMITS[dtype]
        allowed = factor * float(errors["pytorch"].max() + floor * max(1.0, float(truth.abs().max())))
        worst, mean = float(errors.get("native", errors["pytorch"]).max()), record["errors"][-1].get("native", 1.0)
        if worst > allowed or mean > MEAN_FACTOR:
            record["red"].append(f"{inputs} to {outputs}")

        def timed(call: Callable[..., Any], weights: Any = weights, rest: Any = (bias, gelu), x: Any = x) -> Any:
            return lambda index: call(x, weights[index % len(weights)], *rest)

        samples = interleave({name: timed(call) for name, call in calls.items()}, Pace(rounds=15, seconds=4.0))
        for name, sample in samples.items():
            record["seconds"][name] = record["seconds"].get(name, 0.0) + count * sample.median
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 where a product is over the error budget."""
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    from benchmarks.harness.record import preamble, store
    from deberta_kernels.linear import products

    result = preamble("linear", 1, "cpu", quick=False)
    result["records"] = []
    print(f"{'ms per encoder layer':<22}{'pytorch':>9}{'onednn':>9}{'native':>9}")
    for dtype in (torch.float32, torch.bfloat16):
        if products.lacks_products(dtype):
            continue
        for tokens in map(int, options.tokens.split(",")):
            record = measure(dtype, tokens)
            result["records"].append(record)
            times = (record["seconds"].get(name) for name in ("pytorch", "onednn", "native"))
            cells = "".join(f"{'-' if x is None else format(1e3 * x, '.2f'):>9}" for x in times)
            wrong = f" RED: {', '.join(record['red'])}" if record["red"] else ""
            print(f"{record['dtype']:<10}{tokens:>4} tokens {cells}{wrong}")
    store(result, options.json)
    return int(any(record["red"] for record in result["records"]))
