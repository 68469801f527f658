"""The command line of the measurements.

    python -m benchmarks --help         the kinds
    python -m benchmarks KIND --help    its options
    python -m benchmarks KIND --list    its shapes, candidates and figures

Each kind runs once with 1 thread and once with all, in a process of its own; `--threads 1` or `--threads 4,all` says
which.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.process import environment, note, program


@dataclass(frozen=True)
class Kind:
    """One kind of measurement.

    Attributes:
        module: whose `main` runs it; imported when the number of threads is set, for torch reads that once.
        about: one line.
        threaded: it computes on threads of the processor.
    """

    module: str
    about: str
    threaded: bool = True


KINDS = {
    "core": Kind("benchmarks.core.run", "the attention core beside SDPA and eager code; its extra memory"),
    "model": Kind("benchmarks.model.run", "whole models beside eager, ONNX Runtime, OpenVINO and BERT"),
    "texts": Kind("benchmarks.texts.run", "real texts in tokens per second, beside everything else a user may run"),
    "tensorflow": Kind("benchmarks.model.tensorflow", "a model of TensorFlow beside the same moved over and patched"),
    "train": Kind("benchmarks.training.step", "training steps of a whole model beside eager"),
    "linear": Kind("benchmarks.core.linear", "the linear layers of one encoder layer, by number of tokens"),
    "adapters": Kind("benchmarks.training.adapters", "LoRA, prefixes and prompts, of AdapterHub or PEFT"),
    "memory": Kind("benchmarks.memory", "long documents, the largest model; the table of docs/training.md"),
    "convergence": Kind("benchmarks.training.convergence", "accuracy after fine-tuning with several seeds"),
    "soak": Kind("benchmarks.training.soak", "growth of resident memory over thousands of training steps"),
    "host": Kind("benchmarks.host.run", "what a patched model does beside its kernels"),
    "gpu": Kind("benchmarks.gpu.run", "the GPU kernels: proved, then timed beside everything else", threaded=False),
    "tune": Kind("benchmarks.gpu.tune", "tile sizes of the Triton kernels; writes their table", threaded=False),
    "report": Kind("benchmarks.report", "stored results as tables, sections of a document, pictures", threaded=False),
}


def counts(text: str) -> list[int]:
    """Return the numbers of threads that "1,all" or the like names, each once."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        found = [every if part == "all" else int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise SystemExit(f"--threads must be numbers from 1 on, or all, separated by commas, got {text!r}")
    return list(dict.fromkeys(found))


def run(name: str, threads: int, arguments: Sequence[str]) -> int:
    """Run a kind in this process."""
    kind = KINDS[name]
    given = list(arguments)
    if kind.threaded:
        # Before torch starts its threads: an idle one that spins would count as CPU time.
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
        given += ["--threads", str(threads)]
    return int(importlib.import_module(kind.module).main(given) or 0)


def run_each(name: str, threads: list[int], where: str, arguments: Sequence[str]) -> int:
    """Run a kind with each number of threads in a process of its own; return the largest exit status."""
    status = 0
    for count in threads:
        path = Path(where)
        if where and where != "-" and count != threads[0]:
            path = path.with_name(f"{path.stem}-{count}threads{path.suffix}")
        note(f"{name} with {count} thread(s), run {threads.index(count) + 1} of {len(threads)}")
        command = program(name, "--threads", str(count), *(["--json", str(path)] if where else []), *arguments)
        status = max(status, abs(subprocess.run(command, check=False, env=environment()).returncode))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kind named first; return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    usage = "usage: python -m benchmarks KIND [--list] [--help] [options]"
    if not given or given[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {kind.about}" for name, kind in KINDS.items()]
        print("\n".join([usage, "", *lines]), file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name not in KINDS:
        print(f"{usage}\nunknown kind {name!r}; there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    if "--list" in rest:
        from benchmarks.listing import listing

        print(listing(name))
        return 0
    if not KINDS[name].threaded or {"-h", "--help"} & set(rest):
        return run(name, 1, rest)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--threads", default="1,all")
    parser.add_argument("--json", default="")
    options, rest = parser.parse_known_args(rest)
    threads = counts(options.threads)
    if len(threads) > 1:
        return run_each(name, threads, options.json, rest)
    return run(name, threads[0], [*rest, *(["--json", options.json] if options.json else [])])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
