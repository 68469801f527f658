"""Execute the GPU kernels' PTX, count what one tile of each zone takes, and hold that to committed bounds.

    python tools/count_ptx.py                         with the Triton of this environment; the CUDA kernels
    python tools/count_ptx.py --triton build/triton-3.6.0 --triton build/triton-3.9.0
    python tools/count_ptx.py --only sm_90,none       variants that have all of these in their names
    python tools/count_ptx.py --classes               also instructions by class
    python tools/count_ptx.py --update                write new bounds instead of holding to the old ones

No GPU is needed, and nothing is timed. One line is printed per kernel and zone, for 64 x 64 pairs of a query and a key:

    instr, barrier, wait, special, exchange   instructions of the PTX, of all warps, divided by four: those of each warp
                                              where four warps share a tile
    matrix                                    products of 64 x 64 x 16
    wavefronts, conflicts                     of shared memory by all warps, and how many of them are bank conflicts
    operands                                  wavefronts that wgmma reads its operands with
    engine                                    bytes that the copy engine moves
    bytes, sectors                            of global memory, as lanes ask for them; in sectors of 32 bytes

The zone "program" is what a thread block takes beside its tiles. The exit status is 1 when a figure is over its bound.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

if TYPE_CHECKING:
    from counted.bounds import Bounds, Record
    from counted.figures import Conflict
    from counted.variants import Unit

OLDEST = (3, 6)
HEAD = ["kernel, zone", "instr", "barrier", "wait", "matrix", "special", "exchange", "wavefronts", "conflicts",
        "operands", "engine", "bytes", "sectors"]  # fmt: skip
_FIGURES = ("instructions", "barriers", "waits", *HEAD[4:])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="append", default=[], help="folder with a Triton to count with")
    parser.add_argument("--kernels", default="triton,cuda", help="which of the two kinds")
    parser.add_argument("--only", default="", help="comma-separated parts the name of a variant must have")
    parser.add_argument("--classes", action="store_true", help="print instructions by class as well")
    parser.add_argument("--update", action="store_true", help="write executed_bounds.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", default="", help="also write all figures here")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Unit]:
    """Return what to execute, of the kinds and names that were asked for."""
    from counted import variants

    units: list[Unit] = []
    if "triton" in options.kernels:
        import triton

        units += variants.triton_units(oldest=tuple(map(int, triton.__version__.split(".")[:2])) <= OLDEST)
    if "cuda" in options.kernels:
        units += variants.cuda_units()
    parts = [part for part in options.only.split(",") if part]
    return [unit for unit in units if all(part in unit.title for part in parts)]


def execute(unit: Unit) -> list[Record]:
    """Execute one unit; runs in a process of its own."""
    import torch
    from counted import variants

    torch.set_num_threads(1)
    return variants.records_of(unit)


def measure(units: list[Unit], jobs: int) -> list[Record]:
    """Execute all units; return the records, each kernel and zone once: by the unit that comes first."""
    found: dict[tuple[str, ...], Record] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(units)), mp_context=context) as pool:
        for records in pool.map(execute, units):
            for record in records:
                found.setdefault(record[:4], record)
    return sorted(found.values())


def report_on(records: list[Record], bounds: Bounds, *, classes: bool, complete: bool) -> int:
    """Print a line per kernel and zone, where banks conflict, and what is wrong; return how much is."""
    from counted import bounds as rules

    from deberta_kernels.demo.tables import aligned

    for group in sorted({record[:2] for record in records}):
        ours = [record for record in records if record[:2] == group]
        print(f"\n{' '.join(group)}, executed PTX, for 64 x 64 pairs or per program")
        print(aligned([HEAD, *([r.title, *(f"{r.values[name]:.6g}" for name in _FIGURES)] for r in ours)]))
        if classes:
            names = sorted({name for record in ours for name in record.classes})
            print("\n" + aligned([["kernel, zone", *names], *([r.title, *(f"{r.classes.get(n, 0):.5g}" for n in names)]
                                                               for r in ours)]))  # fmt: skip
        print("\n".join(conflict_lines(ours)))
    wrong = {f"{r.compiler} {r.chip} {r.title}": problems for r in records if (problems := rules.judge(r, bounds))}
    if complete:
        wrong |= {title: ["has bounds, and was not executed"] for title in rules.missing(records, bounds)}
    for title, problems in wrong.items():
        print(f"WRONG {title}: {'; '.join(problems)}")
    return len(wrong)


def conflict_lines(records: list[Record]) -> list[str]:
    """Return where banks conflict, the worst places first, each with the kernels and zones that meet it."""
    found: dict[Conflict, list[str]] = {}
    for record in records:
        for conflict in record.conflicts:
            found.setdefault(conflict, []).append(record.title)
    return [
        f"CONFLICTS at {c.place}: {c.extra:g} of {c.wavefronts:g} wavefronts by {c.executed:g} {c.opcode} "
        f"({'; '.join(titles)})"
        for c, titles in sorted(found.items(), key=lambda item: -item[0].extra)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    options = parse(arguments)
    if options.triton:
        return every_triton(options)
    from counted import bounds as rules
    from ptx.build import NoCompiler
    from ptx.drivers.cuda_modules import NoCudaCompiler

    started = time.perf_counter()
    try:
        units = chosen(options)
        records = measure(units, options.jobs) if units else []
    except (NoCompiler, NoCudaCompiler) as error:
        raise SystemExit(f"tools/count_ptx.py: {error}") from error
    bounds = rules.load()
    if options.update:
        rules.update(bounds, records, complete=not options.only)
        rules.store(bounds)
    wrong = report_on(records, bounds, classes=options.classes, complete=not options.only)
    if options.json:
        Path(options.json).write_text(json.dumps([as_json(r) for r in records], indent=1) + "\n", encoding="utf-8")
    print(f"\n{wrong} wrong" if wrong else "\nall within their bounds", end="")
    print(f"; {len(records)} zones of kernels, {time.perf_counter() - started:.0f} s")
    return int(wrong > 0)


def as_json(record: Record) -> dict[str, Any]:
    """Return a record as JSON has it."""
    return {**record._asdict(), "conflicts": [place._asdict() for place in record.conflicts]}


def every_triton(options: argparse.Namespace) -> int:
    """Run once per Triton, each in a process that imports that one, and once for the CUDA kernels."""
    runs = [(Path(folder).name, "triton", str(Path(folder).resolve())) for folder in options.triton]
    runs = runs if "triton" in options.kernels else []
    runs += [("cuda", "cuda", runs[-1][2] if runs else "")] if "cuda" in options.kernels else []
    status = 0
    for name, kernels, folder in runs:
        path = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache"), **os.environ, "PYTHONPATH": path}
        command = [sys.executable, __file__, "--kernels", kernels, "--only", options.only, "--jobs", str(options.jobs)]
        command += ["--update"] if options.update else []
        command += ["--classes"] if options.classes else []
        command += ["--json", f"{options.json}.{name}"] if options.json else []
        status |= subprocess.run(command, env=environment, check=False).returncode
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
