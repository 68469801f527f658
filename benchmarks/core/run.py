"""Measure every figure of the CPU kernel and print what it must reach and aims at beside what it reaches.

python -m benchmarks core                   everything, about 8 minutes for each number of threads
python -m benchmarks core --quick           small shapes, under a minute
python -m benchmarks core --only sdpa32,peak
python -m benchmarks core --isa all         each instruction set of the library in turn
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.core.candidates import candidates
from benchmarks.core.checking import check_candidates
from benchmarks.core.memory import extra_bytes
from benchmarks.harness import record, tables
from benchmarks.harness.arguments import names
from benchmarks.harness.clock import interleave
from benchmarks.harness.figures import Line
from benchmarks.harness.process import environment, note, program
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.work import needed_flops
from benchmarks.model.run import measure_lengths
from benchmarks.registry import CANDIDATES, CORE_FIGURES, CORE_GROUPS, GROUPS, Shape
from deberta_kernels.env import CPU_ISAS, isas_of

QUICK_SIZES = ((1, 128), (1, 512))
MEMORY_MUST, MEMORY_AIM, GROWTH_MUST = 100.0, 60.0, 2.2
# Pages of the allocator and of Python's own objects, in bytes: growth below this is not growth.
MEMORY_NOISE = 4 << 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = record.options("core", __doc__)
    parser.add_argument("--only", default="", type=names(GROUPS), help=f"groups, comma-separated: {', '.join(GROUPS)}")
    parser.add_argument(
        "--isa", default="", choices=("", "all", *CPU_ISAS), help="instruction set of the native library"
    )
    return parser.parse_args(arguments)


def measure_core(run: Run, groups: frozenset[str]) -> list[Line]:
    """Check and time every shape of the attention core that the groups want."""
    figures = [figure for figure in CORE_FIGURES if figure.group in groups]
    wanted: dict[Shape, set[str]] = {}
    for figure in figures:
        if not run.quick or (figure.shape.batch, figure.shape.length) in QUICK_SIZES:
            wanted.setdefault(figure.shape, set()).update((figure.ours, *figure.others))
    shapes = sorted(wanted, key=lambda shape: (shape.backward, shape.dtype != "float32"))
    progress = Progress(shape.batch * shape.length**0.5 for shape in shapes)
    records = {}
    # Cores of other packages, which no figure asks for, are timed beside all others.
    rivals = {name: candidate.missing for name, candidate in CANDIDATES["core"].items() if candidate.needs}
    for shape in shapes:
        if "huggingface" in wanted[shape] and shape.length <= 512 and shape.batch == 1:
            wanted[shape].add("eager")  # the budget's own eager beside the original: they should agree
        wanted[shape] |= {name for name, why in rivals.items() if not why}
        records[shape] = _measure(run, shape, frozenset(wanted[shape]), progress)
        if any(rivals.values()):
            records[shape]["missing"] = {name: why for name, why in rivals.items() if why}
    run.keep(core=list(records.values()))
    lines = []
    for figure in figures:
        shape = figure.shape
        flops = needed_flops([shape.length] * shape.batch, "core backward" if shape.backward else "core")
        lines.append(run.judge(figure, records.get(shape), flops, "not in --quick"))
    return lines


def _measure(run: Run, shape: Shape, wanted: frozenset[str], progress: Progress) -> dict[str, Any]:
    title = f"{shape.label} {shape.dtype}" + (" forward + backward" if shape.backward else " forward")
    found: dict[str, Any] = {**shape.__dict__, "label": shape.label, "checks": {}, "samples": {}, "own_peak_gflops": []}
    try:
        checks = check_candidates(shape, sorted(wanted), run.backend)
    except (ImportError, MemoryError, RuntimeError) as error:
        found["reason"] = f"RED: the check itself failed: {type(error).__name__}: {error}"
        progress.step(f"{title}: {found['reason']}")
        return found
    found["checks"] = {name: check.as_json() for name, check in checks.items()}
    red = [name for name, check in checks.items() if not check.ok]
    for name in red:
        note(f"{title}: RED, not timed\n{checks[name].text}")
    peaks = [run.own_peak(shape.dtype)]
    samples = interleave(candidates(shape, wanted - set(red), run.backend), run.pace)
    peaks.append(run.own_peak(shape.dtype))
    found["samples"] = {name: sample.as_json() for name, sample in samples.items()}
    found["own_peak_gflops"] = [round(peak, 2) for peak in peaks if peak is not None]
    progress.step(f"{title}: {run.times(found['samples'])}")
    return found


def measure_memory(run: Run) -> list[Line]:
    """Measure the extra memory of one call at two lengths, and that it grows no faster than the length."""
    largest, top_backward = (4096, 2048) if run.quick else (16384, 4096)
    runs = [("float32", False, largest)]
    if not run.quick:
        runs += [("bfloat16", False, largest), ("float32", True, top_backward)]
    records: list[dict[str, Any]] = []
    lines: list[Line] = []
    for dtype, backward, length in runs:
        direction = "forward + backward" if backward else "forward"
        found = {}
        for n in (length // 2, length):
            found[n] = extra_bytes(n, dtype, run.backend, run.threads, backward=backward)
            records.append({"dtype": dtype, "length": n, "backward": backward, **found[n]})
            note(f"memory {n} {dtype} {direction}: {found[n]}")
        main = dtype == "float32" and not backward and not run.quick
        must, aim = (MEMORY_MUST, MEMORY_AIM) if main else (None, None)
        title, case = f"extra memory of one layer, {direction}", f"1x{length} {dtype}"
        growth = "the same, twice the length over the length (N^2 would be 4)"
        failed = [x["error"] for x in found.values() if "error" in x]
        if failed:
            values: list[dict[str, Any]] = [{"reason": f"not available: {failed[0]}"}] * 2
        else:
            small, large = found[length // 2]["bytes"], found[length]["bytes"]
            grown = max(large - MEMORY_NOISE, 0) / max(small, MEMORY_NOISE)
            values = [{"median": x, "best": x} for x in (max(large, 0) / tables.MEGABYTE, grown)]
        lines.append(Line("memory", title, case, must, aim, False, "MB", **values[0]))
        lines.append(Line("memory", growth, case, GROWTH_MUST, None, False, "", **values[1]))
    run.keep(memory=records)
    return lines


def every_isa(options: argparse.Namespace) -> int:
    """Measure each instruction set in a process of its own, since the library chooses once; print them side by side."""
    results, status = {}, 0
    isas = isas_of(platform.machine())
    for isa in isas:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(options.json or folder) if options.json and options.json != "-" else Path(folder)
            path = path / f"{isa}.json" if path.suffix != ".json" else path.with_name(f"{path.stem}-{isa}.json")
            command = program("core", "--isa", isa, "--json", str(path), "--threads", str(options.threads))
            command += [
                "--only",
                ",".join(options.only or ("sdpa32", "sdpa16", "peak")),
                *(["--quick"] if options.quick else []),
            ]
            note(f"instruction set {isa}, {isas.index(isa) + 1} of {len(isas)}")
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=environment())
            if done.returncode or not path.exists():
                note(f"{isa}: exit status {done.returncode}; left out")
                status = 1
                continue
            results[isa] = json.loads(path.read_text(encoding="utf-8"))
            if not options.json:
                record.store(results[isa], "")
    print(tables.side_by_side(results))
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer, or with --strict for a missed figure."""
    options = parse(arguments)
    groups = frozenset(options.only or GROUPS)
    if options.isa == "all":
        return every_isa(options)
    if options.isa:
        os.environ["DEBERTA_KERNELS_CPU_ISA"] = options.isa
    run = Run("cpu", options, **({"isa": options.isa} if options.isa else {}))
    if options.isa and run.result["library"].get("isa") != options.isa:
        note(f"--isa {options.isa}: this machine or library runs {run.result['library'].get('isa')}")
        return 1
    run.measure_rates()
    lines: list[Line] = []
    if groups & set(CORE_GROUPS):
        lines += measure_core(run, groups)
    if "model" in groups:
        lines += measure_lengths(run)
    if "memory" in groups:
        lines += measure_memory(run)
    lines.sort(key=lambda line: GROUPS.index(line.group))
    run.keep(lines)
    print(tables.text(run.result))
    return run.status
