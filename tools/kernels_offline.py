"""Compile every Triton kernel for devices that are not here, and hold what comes out to committed bounds.

    python tools/kernels_offline.py                          with the Triton of this environment
    python tools/kernels_offline.py --triton build/triton-3.6.0 --triton build/triton-3.9.0
    python tools/kernels_offline.py --only sm_90,forward     lines whose chip, kernel or variant has all of these in it
    python tools/kernels_offline.py --update                 write new bounds instead of holding to the old ones

No GPU is needed: ptxas, cuobjdump and nvdisasm come with Triton. One line is printed per kernel; the exit status is 1
when one is over a bound, is a stub, lacks its matrix instructions or a fence between asynchronous copies and those, or
wants more shared memory than the device has.
Instructions are counted as they stand in the code, per warp; "near" and "far" are one pass of the loops over tiles.
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

OLDEST = (3, 6)
HEAD = [
    "kernel",
    "regs",
    "stack",
    "shared",
    "matrix",
    "shfl",
    "local",
    "instr",
    "near",
    "(local)",
    "far",
    "(local)",
    "plain",
]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--triton", action="append", default=[], help="folder with a Triton, as pip install --target made it"
    )
    parser.add_argument("--only", default="", help="comma-separated parts a line must have")
    parser.add_argument("--update", action="store_true", help="write bounds.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", default="", help="also write all counts here")
    return parser.parse_args(arguments)


def units(chosen: list[Any]) -> dict[tuple[str, str], tuple[Any, int]]:
    """Return what to compile: (chip, kernel and its variant) -> (variant of the call, number of the launch).

    A kernel that lacks a feature is the same in every variant of the call, and is compiled once.
    """
    from offline import variants

    found: dict[tuple[str, str], tuple[Any, int]] = {}
    for variant in chosen:
        for number, launch in enumerate(variants.launches(variant)):
            found.setdefault((variant.chip, variants.kernel_title(variant, launch)), (variant, number))
    return found


def compile_unit(variant: Any, number: int) -> dict[str, Any]:
    """Compile one kernel; runs in a process of its own."""
    from offline import compiling, variants
    from offline.chips import CHIPS

    from deberta_kernels.impl.triton import launch as launching

    chip = CHIPS[variant.chip]
    launch = variants.launches(variant)[number]
    record: dict[str, Any] = {}
    try:
        options = launching.options(launch)
        report = compiling.compile_launch(launch.kernel, {**launch.arguments, **launch.constants}, chip, options)
        record["report"] = report.as_json()
        if report.far is not None:
            record["plain"] = plain_loop(variant, launch, chip, options)
    except Exception as error:  # one kernel that does not compile must not hide the others
        text = f"{type(error).__name__}: {error}".replace("\n", " | ")
        cause = f" caused by {error.__cause__!r}"[:300] if error.__cause__ else ""
        record["error"] = (text if len(text) < 600 else f"{text[:200]} ... {text[-400:]}") + cause
    return record


def plain_loop(variant: Any, launch: Any, chip: Any, options: dict[str, int]) -> int | None:
    """Return the instructions of one pass of a plain flash attention's loop with the tile of a forward."""
    if variant.direction != "forward":
        return None
    import torch
    from offline import compiling, variants
    from offline.flash import plain_flash_kernel

    dtype, rows = variants.DTYPES[variant.dtype], launch.constants["QUERIES"]
    shape = (variants.BATCH, variants.LENGTH, variants.HEADS, variant.head_dim)
    q, k, v, out = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(4))
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": torch.empty(shape[:3], device="meta"),
        "scale": 0.1, "heads": shape[2], "queries": shape[1], "keys": shape[1],
        "stride_b": q.stride(0), "stride_h": q.stride(2), "stride_n": q.stride(1),
        "HEAD_DIM": launch.constants["BLOCK_D"], "BLOCK_M": rows, "BLOCK_N": launch.constants["TILE"],
    }  # fmt: skip
    report = compiling.compile_launch(plain_flash_kernel, arguments, chip, options)
    return None if report.near is None else report.near.instructions


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compile with the Triton of this process's environment."""
    import triton
    from offline import variants

    version = ".".join(triton.__version__.split(".")[:2])
    chosen = variants.selection(oldest=tuple(map(int, version.split("."))) <= OLDEST)
    parts = [part for part in options.only.split(",") if part]
    chosen = [v for v in chosen if all(part in f"{v.chip} {v.direction} {v.title}" for part in parts)]
    started = time.perf_counter()
    planned = units(chosen)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = {key: pool.submit(compile_unit, *unit) for key, unit in planned.items()}
        records = [{"chip": chip, "name": name, **done.result()} for (chip, name), done in waiting.items()]
    seconds = time.perf_counter() - started
    found = {"triton": version, "release": triton.__version__, "records": records, "seconds": seconds}
    return {**found, "complete": not parts}


def row(record: dict[str, Any]) -> list[str]:
    """Return the cells of one line."""
    if "error" in record:
        return [f"{record['chip']} {record['name']}", record["error"][:100]]
    report = record["report"]
    whole, near, far = report["whole"], report["near"], report["far"]

    def local(counts: dict[str, int] | None) -> str:
        return "" if counts is None else f"({counts['local_loads'] + counts['local_stores']})"

    return [
        f"{record['chip']} {record['name']}",
        *(str(report[name]) for name in ("registers", "stack", "shared")),
        f"{whole['matrix']} {report['matrix_name']}" if whole["matrix"] else "-",
        str(whole["shuffles"]),
        str(whole["local_loads"] + whole["local_stores"]),
        str(whole["instructions"]),
        "-" if near is None else str(near["instructions"]),
        local(near),
        "-" if far is None else str(far["instructions"]),
        local(far),
        str(record.get("plain") or "-"),
    ]


def report_on(result: dict[str, Any], bounds: dict[str, Any], missed: dict[str, str], *, update: bool) -> int:
    """Print one line per kernel, then what is wrong and which promises are not kept; return how many are wrong.

    Args:
        result: what `measure` returned.
        bounds: those of `bounds.json`; with update they are changed to what was measured.
        missed: promises known not to be kept: "chip kernel and variant" -> the reason.
        update: take what was measured as the new bounds.
    """
    from offline import bounds as rules
    from offline.counting import Report

    from deberta_kernels.demo.tables import aligned

    known = bounds.setdefault(result["triton"], {})
    if update and result["complete"]:
        known.clear()  # kernels that are gone
    rows, wrong, unkept = [HEAD], {}, {}
    for record in sorted(result["records"], key=lambda record: (record["chip"], record["name"])):
        rows.append(row(record))
        title = rows[-1][0]
        if "error" in record:
            wrong[title] = ["does not compile: " + record["error"]]
            continue
        report = Report.from_json(record["report"])
        entries = known.setdefault(record["chip"], {})
        if update:
            entries[record["name"]] = rules.limits(report)
        problems = rules.judge(report, record["chip"], record["name"], entries.get(record["name"]))
        broken = rules.broken_promises(report, record["chip"], record["name"], record.get("plain"))
        if broken and title in missed:
            unkept[title] = f"{'; '.join(broken)}: {missed[title]}"
        else:
            problems = [*broken, *problems]
        if problems:
            wrong[title] = problems
    print(f"\nTriton {result['release']}, {len(rows) - 1} kernels, {result['seconds']:.0f} s")
    print(aligned(rows))
    for title, text in unkept.items():
        print(f"MISSED {title}: {text}")
    for title, problems in wrong.items():
        print(f"WRONG {title}: {'; '.join(problems)}")
    return len(wrong)


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    options = parse(arguments)
    from offline import bounds as rules

    if options.triton:
        return every_triton(options)
    result = measure(options)
    bounds = rules.load()
    wrong = report_on(result, bounds, rules.load(rules.MISSED), update=options.update)
    if options.update:
        rules.store(bounds)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{wrong} of {len(result['records'])} kernels wrong" if wrong else "all within their bounds")
    return int(wrong > 0)


def every_triton(options: argparse.Namespace) -> int:
    """Run once per Triton, each in a process that imports that one."""
    status = 0
    for folder in options.triton:
        path = os.pathsep.join([str(Path(folder).resolve()), str(ROOT), os.environ.get("PYTHONPATH", "")])
        cache = ROOT / "build" / "triton-cache"
        environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
        command = [sys.executable, __file__, "--only", options.only, "--jobs", str(options.jobs)]
        command += ["--update"] if options.update else []
        command += ["--json", f"{options.json}.{Path(folder).name}"] if options.json else []
        status |= subprocess.run(command, env=environment, check=False).returncode
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
