"""The attention core timed without a checkout: the automatic backend against the reference and PyTorch's attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

import deberta_kernels as dk
from deberta_kernels.demo.arguments import Parser, lengths, seconds, threads
from deberta_kernels.native import processor
from deberta_kernels.testing.geometries import settings

__all__ = ["run"]

_SIZES = settings("v3-base")
HEADS, BUCKETS = _SIZES["num_attention_heads"], _SIZES["position_buckets"]
HEAD_DIM = _SIZES["hidden_size"] // HEADS


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each call, the calls taking turns for about this long in all."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def run(arguments: Sequence[str]) -> int:
    """Print one line per length; return the exit status."""
    parser = Parser(prog="deberta-kernels bench", description=__doc__)
    parser.add_argument("--lengths", type=lengths, default=(128, 512, 1024), help="tokens, comma-separated")
    parser.add_argument("--threads", type=threads, default=1)
    parser.add_argument("--seconds", type=seconds, default=2.0, help="per length")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where = processor.with_cores(processor.everyday_name(), options.threads)
    print(f"forward, float32, B1 H{HEADS} D{HEAD_DIM}, {where}")
    print("ms, medians, calls taking turns; SDPA computes no position terms and is shown as the floor")
    print(f"{'N':>6} {'reference':>11} {'SDPA':>9} {'this':>9}   backend")
    for length in options.lengths:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))
        tables = [torch.randn(HEADS, 2 * BUCKETS, HEAD_DIM, generator=generator) for _ in range(2)]
        chosen = dk.explain(q, k, v, *tables).chosen

        def this(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, tables: list[torch.Tensor] = tables,
                 backend: str = "auto") -> object:  # fmt: skip
            return dk.disentangled_attention(q, k, v, *tables, backend=backend)

        torch.testing.assert_close(this(), this(backend="reference"), atol=1e-4, rtol=1e-3)
        found = medians(
            {
                "reference": lambda this=this: this(backend="reference"),  # type: ignore[misc]
                "sdpa": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v),  # type: ignore[misc]
                "this": this,
            },
            options.seconds,
        )
        times = " ".join(
            f"{found[name] * 1e3:>{width}.2f}" for name, width in (("reference", 11), ("sdpa", 9), ("this", 9))
        )
        print(f"{length:>6} {times}   {chosen}")
    return 0
