"""Time whole models: patched against eager, ONNX Runtime, OpenVINO and BERT, on full and ragged batches.

python -m benchmarks model                   random weights in v3-base geometry, half an hour
python -m benchmarks model DIRECTORY         a local checkpoint
python -m benchmarks model --quick           short batches, two minutes
python -m benchmarks model --memory          long documents and the largest model: memory alone
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="", help="directory of a DeBERTa-v2 or v3 checkpoint")
    parser.add_argument("--quick", action="store_true", help="batches of up to 512 tokens and few rounds")
    parser.add_argument("--only", default="", help="dtypes, comma-separated: float32, bfloat16")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/; '-': nowhere")
    parser.add_argument("--backend", default="cpu", help="which backend is ours: cpu, torch or reference")
    parser.add_argument("--memory", action="store_true", help="measure the memory of long documents and large models")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the peak memory of each candidate")
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
    from benchmarks.model.batches import MODEL_SHAPES
    from benchmarks.model.measure import Workshop, judge, measure_shapes
    from benchmarks.model.memory import measure_large, measure_peaks

    started = time.perf_counter()
    result = preamble("memory" if options.memory else "model", 1, options.backend, quick=options.quick)
    result["settings"]["model"] = Path(options.source).resolve().name if options.source else "v3-base, random weights"
    plan = Plan(frozenset(), options.backend, 1, options.quick, note)
    result["rates_gflops"] = machine.rates(plan.pace)

    def finish(lines: list[Any]) -> None:
        result["figures"] = [line.as_json() for line in lines]
        result["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
        result["seconds"] = round(time.perf_counter() - started, 1)

    if options.memory:
        result["memory"], lines = measure_large(plan)
        finish(lines)
        return result
    dtypes = set(filter(None, options.only.split(","))) or {"float32", "bfloat16"}
    largest = 512 if options.quick else max(shape.batch * shape.length for shape in MODEL_SHAPES)
    shapes = [s for s in MODEL_SHAPES if s.dtype in dtypes and s.batch * s.length <= largest]
    shapes.sort(key=lambda shape: (shape.batch * shape.length, shape.length))
    workshop = Workshop(plan, options.source)

    def so_far(records: list[dict[str, Any]]) -> None:
        result["models"] = records
        result["complete"] = len(records) == len(shapes)
        finish(judge(records, plan.pick, result["rates_gflops"]))
        store(result, options.json)

    so_far(measure_shapes(workshop, shapes, so_far))
    if not options.no_peaks:
        lines = judge(result["models"], plan.pick, result["rates_gflops"])
        result["peaks"] = measure_peaks(workshop, shapes)
        finish(lines)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    options = parse(arguments)
    # Before torch starts its threads: an idle one that spins would count as CPU time.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from benchmarks.harness.record import store
    from benchmarks.model.report import text

    result = measure(options)
    print(text(result))
    store(result, options.json)
    verdicts = {figure["verdict"] for figure in result["figures"]}
    return int("RED" in verdicts or (options.strict and "MISSED" in verdicts))
