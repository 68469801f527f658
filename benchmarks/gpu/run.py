"""Prove the GPU kernels on the device at hand, then time them beside everything else there is; one command.

python -m benchmarks gpu                  everything, under 9 minutes
python -m benchmarks gpu --smoke          the 90-second form
python -m benchmarks gpu --stages correctness,core
python -m benchmarks gpu --device cpu --backend torch     no GPU: tries this program itself, on tiny shapes

It needs torch and Triton, asks nothing of the network, and installs nothing. Every stage is a process of its own with a
limit of its own: a crash, a hang or a poisoned device costs one item. The JSON file is written again whenever an item
is finished, so that a run cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import names, numbers
from benchmarks.harness.process import RESULTS, ROOT, file_name, note, now, write_json

SCHEMA = 1
# Stage: (limit in seconds, limit of one item in seconds), whole run and smoke; in this order.
LIMITS = {
    "ceilings": ((45, 45), (25, 25)),
    "compile": ((100, 100), (30, 30)),
    "correctness": ((120, 60), (30, 25)),
    "core": ((100, 50), (30, 25)),
    "graphs": ((90, 70), (0, 0)),
    "rivals": ((90, 50), (0, 0)),
    "sanitizer": ((90, 60), (0, 0)),
    "compiled": ((70, 60), (0, 0)),
    "models": ((50, 45), (0, 0)),
    # Only when asked for: Nsight Compute repeats every kernel many times.
    "counters": ((0, 0), (0, 0)),
}
# Stage: which function of this folder makes its items.
ITEMS = {
    "ceilings": "device.items",
    "compile": "precompile.items",
    "correctness": "correctness.items",
    "core": "timings.core_items",
    "graphs": "graphs.items",
    "rivals": "timings.rival_items",
    "sanitizer": "profilers.sanitizer_items",
    "compiled": "timings.compiled_items",
    "models": "models.items",
    "counters": "profilers.counter_items",
}
ASKED_FOR = (300, 200)
SECONDS, SMOKE_SECONDS = 525.0, 85.0
SLACK = 6


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", default="triton", help="which backend is ours: triton, cuda or torch")
    parser.add_argument("--smoke", action="store_true", help="the 90-second form")
    parser.add_argument("--stages", default="", type=names(LIMITS), help=f"comma-separated: {', '.join(LIMITS)}")
    parser.add_argument("--lengths", default="", type=numbers, help="comma-separated lengths of the timed shapes")
    parser.add_argument(
        "--candidates", default="", help="comma-separated candidates, as the tables of the JSON name them"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seconds", type=float, default=0.0, help="limit of the whole run")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/")
    parser.add_argument("--commit", default="", help="commit to record where git is not at hand")
    for internal in ("--worker", "--plan", "--lines"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--profiled", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Any:
    """Return the settings that the options ask for."""
    from benchmarks.gpu.plan import Plan
    from benchmarks.registry import GPU_LENGTHS

    small, smoke = options.device == "cpu", options.smoke
    default = (32, 64) if small else (512, 2048) if smoke else GPU_LENGTHS
    return Plan(
        device=options.device,
        backend=options.backend,
        smoke=smoke,
        tokens=128 if small else 16384,
        lengths=options.lengths or default,
        dtype=options.dtype,
        seconds=0.05 if small else 0.25 if smoke else 0.5,
        candidates=tuple(filter(None, options.candidates.split(","))),
    )


def worker(options: argparse.Namespace) -> int:
    """Run the items of one stage; the process that `supervise` starts."""
    from benchmarks.gpu.device import healthy
    from benchmarks.gpu.plan import Plan
    from benchmarks.gpu.stages import work
    from deberta_kernels import env

    plan = Plan.from_text(options.plan)
    # What runs here is the proof; one item has the package test itself.
    os.environ.setdefault(env.SELF_TEST, "0")
    # cuBLAS repeats its bits only with a workspace of a fixed size, which must be asked for before it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if plan.device == "cpu":
        import torch

        torch.set_num_threads(1)
    items = stage_items(options.worker, plan, json.loads(os.environ.get("GPU_RATES", "{}")))
    return work(items, Path(options.lines), frozenset(options.skip), lambda: healthy(plan.device))


def child(options: argparse.Namespace) -> int:
    """Do what a process was started for by another one of this program."""
    from benchmarks.gpu.plan import Plan

    plan = Plan.from_text(options.plan)
    if options.worker:
        return worker(options)
    if options.share:
        from benchmarks.gpu.precompile import run_share

        return run_share(plan, options.share)
    from benchmarks.gpu import profilers

    return profilers.run_small(plan) if options.small else profilers.run_profiled(plan, options.profiled)


def stage_items(stage: str, plan: Any, rates: dict[str, Any]) -> list[Any]:
    """Return the items of a stage; `rates` are those of the first one."""
    module, function = ITEMS[stage].split(".")
    make = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    return list(make(plan, rates) if module == "timings" else make(plan))


class Run:
    """The result of a run on the way to its file."""

    def __init__(self, options: argparse.Namespace, plan: Any) -> None:
        """Start with an empty result."""
        from benchmarks.harness import machine

        commit = machine.commit()
        if options.commit:
            commit = {"id": options.commit, "modified": commit["modified"]}
        self.started = time.monotonic()
        self.where = options.json
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "date": now(),
            "commit": commit,
            "device": {},
            "plan": json.loads(plan.as_text()),
            "asked": [plan.backend],
            "rates": {},
            "stages": {},
            "figures": [],
            "proven": [],
            "seconds": 0.0,
        }

    def update(self, stage: str, record: dict[str, Any]) -> None:
        """Take in what a stage has so far and write the file."""
        from benchmarks.gpu.table import figures
        from benchmarks.harness.proving import proven

        self.result["stages"][stage] = record
        if stage == "ceilings":
            self.result["device"] = record["items"].get("device", {})
            self.result["asked"] = self.result["device"].get("asked", self.result["asked"])
            self.result["rates"] = record["items"].get("rates", {})
            os.environ["GPU_RATES"] = json.dumps(self.result["rates"])
        self.result["figures"] = figures(self.result)
        self.result["proven"] = proven(self.result)
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        write_json(self.path, self.result)

    @property
    def path(self) -> Path:
        """Return where the result goes."""
        if self.where:
            return Path(self.where)
        from benchmarks.gpu.device import folder

        device = self.result["device"].get("name") or self.result["plan"]["device"]
        base = ROOT / "build" / "gpu" if self.result["plan"]["device"] == "cpu" else RESULTS
        return base / folder(device) / file_name("gpu", self.result)


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 when an answer is wrong or something broke, 2 without a device."""
    options = parse(arguments)
    if options.plan:
        return child(options)
    from benchmarks.gpu.stages import Stage, supervise
    from benchmarks.gpu.table import problems, table

    if options.device == "cuda" and (missing := _missing()):
        print(f"python -m benchmarks gpu: {missing}", file=sys.stderr)
        return 2
    wanted = options.stages
    plan = plan_of(options)
    run = Run(options, plan)
    # What the processor computes here takes no fixed time: others may be busy on it.
    slack = SLACK if plan.small else 1
    deadline = time.monotonic() + (options.seconds or slack * (SMOKE_SECONDS if options.smoke else SECONDS))
    for name, limits in LIMITS.items():
        whole, smoke = ((slack * seconds, slack * item) for seconds, item in limits)
        seconds, item_seconds = smoke if options.smoke else whole
        chosen = name in wanted or name == "ceilings" if wanted else seconds > 0
        left = deadline - time.monotonic()
        if not chosen:
            continue
        if left < 5:
            run.update(name, {"items": {}, "seconds": 0.0, "complete": False, "broken": "no time left"})
            continue
        stage = Stage(name, *((seconds, item_seconds) if seconds else whole if whole[0] else ASKED_FOR))
        note(f"stage {name}, at most {min(stage.seconds, left):.0f} s; at most {left:.0f} s left of the run")
        record = supervise(stage, plan, min(stage.seconds, left), lambda so_far, name=name: run.update(name, so_far))
        run.update(name, record)
    run.result["problems"] = problems(run.result)
    write_json(run.path, run.result)
    print(table(run.result))
    print(f"written: {run.path}")
    return int(bool(run.result["problems"]))


def _missing() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed for this Python; name one that has it: make gpu GPU_PYTHON=python3"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU; --device cpu --backend torch tries the program itself"
    return ""
