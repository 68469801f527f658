"""Time a training step of the whole model: patched, with PyTorch's and with native linear layers, against eager.

python -m benchmarks train            v3-base geometry, both dtypes; 15 minutes on a quiet machine
python -m benchmarks train --quick    fewer rounds; 5 minutes
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", default="", help="dtypes, comma-separated: float32, bfloat16")
    parser.add_argument("--sizes", default="", help="batches, comma-separated, such as 8x128")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/; '-': nowhere")
    parser.add_argument("--backend", default="cpu", help="which backend is ours: cpu, torch or reference")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a figure misses its must")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is wanted and return what the JSON file holds; after each shape, store what there is."""
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    from benchmarks.core.measure import Plan
    from benchmarks.harness import machine
    from benchmarks.harness.record import note, preamble, store
    from benchmarks.training.step import TRAIN_SHAPES, Workshop, judge_training, measure_step

    started = time.perf_counter()
    result = preamble("train", 1, options.backend, quick=options.quick)
    plan = Plan(frozenset(), options.backend, 1, options.quick, note)
    result["rates_gflops"] = machine.rates(plan.pace)
    dtypes = set(filter(None, options.only.split(","))) or {"float32", "bfloat16"}
    sizes = set(filter(None, options.sizes.split(",")))
    shapes = [s for s in TRAIN_SHAPES if s.dtype in dtypes and (not sizes or s.label in sizes)]
    workshop = Workshop(plan)
    records: list[dict[str, Any]] = []
    for shape in shapes:
        records.append(measure_step(workshop, shape))
        result["steps"], result["complete"] = records, len(records) == len(shapes)
        lines = judge_training(records, plan.pick, result["rates_gflops"])
        result["figures"] = [line.as_json() for line in lines]
        result["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
        result["seconds"] = round(time.perf_counter() - started, 1)
        store(result, options.json)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    options = parse(arguments)
    # Before torch starts its threads: an idle one that spins would count as CPU time.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from benchmarks.report import table

    result = measure(options)
    print(table(result))
    verdicts = {figure["verdict"] for figure in result["figures"]}
    return int("RED" in verdicts or (options.strict and "MISSED" in verdicts))
