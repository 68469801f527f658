"""Measure every figure of the CPU kernel and print what it must reach and aims at beside what it reaches.

python -m benchmarks core                  everything, about 8 minutes
python -m benchmarks core --quick          small shapes, under a minute
python -m benchmarks core --only sdpa32,peak
python -m benchmarks core --isa all        each instruction set of the library in turn
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ISAS = ("avx512_bf16", "avx512", "avx2", "generic")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    groups = "sdpa32, sdpa16, eager, backward, peak, model, memory"
    parser.add_argument("--only", default="", help=f"groups, comma-separated: {groups}")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/; '-': nowhere")
    parser.add_argument("--threads", type=int, default=1, help="above 1, the wall clock counts instead of CPU time")
    parser.add_argument("--isa", default="", choices=("", "all", *ISAS), help="instruction set of the native library")
    parser.add_argument("--backend", default="cpu", help="which backend is ours: cpu, torch or reference")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a figure misses its must")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the groups wanted and return what the JSON file holds."""
    import torch

    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    from benchmarks.core import measure as measuring
    from benchmarks.harness import machine
    from benchmarks.harness import record as recording

    groups = frozenset(filter(None, options.only.split(","))) or frozenset(measuring.GROUPS)
    if unknown := groups - set(measuring.GROUPS):
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(measuring.GROUPS)}")
    plan = measuring.Plan(groups, options.backend, options.threads, options.quick, recording.note)
    started = time.perf_counter()
    result = recording.preamble("cpu", options.threads, options.backend, quick=options.quick)
    result["rates_gflops"] = machine.rates(plan.pace)
    recording.note(f"rates: {result['rates_gflops']}")
    lines = []
    for name, wanted, run in (
        ("core", measuring.CORE_GROUPS, measuring.measure_core),
        ("models", ("model",), measuring.measure_models),
        ("memory", ("memory",), measuring.measure_memory),
    ):
        if groups & set(wanted):
            result[name], new = run(plan)
            lines += new
    lines.sort(key=lambda line: measuring.GROUPS.index(line.group))
    result["figures"] = [line.as_json() for line in lines]
    result["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def every_isa(options: argparse.Namespace) -> int:
    """Measure each instruction set in a process of its own, since the library chooses once; print them side by side."""
    from benchmarks.harness.process import environment, program
    from benchmarks.harness.record import note, store
    from benchmarks.report import side_by_side

    results, status = {}, 0
    for isa in ISAS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(options.json or folder) if options.json and options.json != "-" else Path(folder)
            path = path / f"{isa}.json" if path.suffix != ".json" else path.with_name(f"{path.stem}-{isa}.json")
            command = program("core", "--isa", isa, "--json", str(path), "--threads", str(options.threads))
            command += ["--only", options.only or "sdpa32,sdpa16,peak", *(["--quick"] if options.quick else [])]
            note(f"instruction set {isa}")
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=environment())
            if done.returncode or not path.exists():
                note(f"{isa}: exit status {done.returncode}; left out")
                status = 1
                continue
            results[isa] = json.loads(path.read_text(encoding="utf-8"))
            if not options.json:
                store(results[isa], "")
    print(side_by_side(results))
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer, or with --strict for a missed figure."""
    options = parse(arguments)
    # Before torch starts its threads: an idle one that spins would count as CPU time.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    if options.isa == "all":
        return every_isa(options)
    if options.isa:
        os.environ["DEBERTA_KERNELS_CPU_ISA"] = options.isa
    from benchmarks.harness.record import note, store
    from benchmarks.report import table

    result = measure(options)
    if options.isa:
        result["settings"]["isa"] = options.isa
        if result["library"].get("isa") != options.isa:
            note(f"--isa {options.isa}: this machine or library runs {result['library'].get('isa')}")
            return 1
    print(table(result))
    store(result, options.json)
    verdicts = {figure["verdict"] for figure in result["figures"]}
    return int("RED" in verdicts or (options.strict and "MISSED" in verdicts))
