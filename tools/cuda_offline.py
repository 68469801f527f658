"""Compile the CUDA kernels with nvcc, without a GPU, and hold what comes out to committed bounds.

    python tools/cuda_offline.py            hold to the bounds
    python tools/cuda_offline.py --update   write new ones

One line per kernel: registers at launch, bytes of spills, warnings of serialised products, shared memory, and per warp
the instructions of one pass of the loops over full near and far tiles, and of plain flash attention. The exit status is
1 when one is over its bound or breaks a promise. nvdisasm comes with Triton's wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

from offline import cuda  # noqa: E402
from offline.bounds import FAR_OVER_PLAIN  # noqa: E402
from offline.chips import CHIPS  # noqa: E402
from offline.cuda import CudaReport, full_tile  # noqa: E402

from deberta_kernels.demo.tables import aligned  # noqa: E402

BOUNDS = ROOT / "tools" / "offline" / "cuda_bounds.json"
# Promises that no measurement moves.
SHARED = CHIPS["sm_90"].shared
# Per warp and 128 x 128 pairs at D = 64, without masks and dropout: no more cycles than matrix units take, and a tenth.
NEAR_INSTRUCTIONS = 1400
# How much a loop may grow before it is a regression: factor and absolute slack.
SLACK = (1.03, 2)

HEAD = [
    "kernel", "regs", "spills", "serial", "shared", "near", "matrix", "st.shared", "ld.shared", "special", "shuffles",
    "far", "matrix", "special", "plain",
]  # fmt: skip


def measures(report: CudaReport) -> dict[str, int]:
    """Return the numbers of a report that are bounded."""
    return {"near loop": report.near.instructions, "far loop": report.far.instructions}


def broken(kernel: str, report: CudaReport, bound: dict[str, list[int]] | None) -> list[str]:
    """Return what is wrong with a kernel, one clause each."""
    wrong = []
    backward = kernel.startswith("disentangled_backward")
    if report.spills:
        wrong.append(f"{report.spills} bytes of spills")
    if report.serialised:
        wrong.append("its products are serialised")
    if report.shared > SHARED:
        wrong.append(f"{report.shared} bytes of shared memory are more than {SHARED}")
    if kernel.endswith("_d64") and not backward and full_tile(report.near) > NEAR_INSTRUCTIONS:
        wrong.append(f"{full_tile(report.near)} instructions for a near tile of 128 x 128, over {NEAR_INSTRUCTIONS}")
    if report.plain is not None and report.far.instructions > FAR_OVER_PLAIN * report.plain.instructions:
        wrong.append(f"far loop {report.far.instructions}, plain flash attention {report.plain.instructions}")
    if bound is None:
        return [*wrong, "no bound is committed for it; run with --update and look at what changes"]
    for name, value in measures(report).items():
        was, most = bound.get(name, (0, 0))
        if value > most:
            wrong.append(f"{name} {value} is over {most} (was {was})")
    return wrong


def store(bounds: dict[str, dict[str, dict[str, list[int]]]]) -> None:
    """Write the bounds, one kernel a line, so that a change reads as one."""
    parts = []
    for version, kernels in sorted(bounds.items()):
        rows = [f"  {json.dumps(kernel)}: {json.dumps(entry)}" for kernel, entry in kernels.items()]
        parts.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    BOUNDS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def row(kernel: str, report: CudaReport) -> list[str]:
    """Return the cells of one line."""
    near, far = report.near, report.far
    numbers = [
        report.registers, report.spills, report.serialised, report.shared, near.instructions, near.matrix,
        near.shared_stores, near.shared_loads, near.special, near.shuffles, far.instructions, far.matrix, far.special,
    ]  # fmt: skip
    return [kernel, *map(str, numbers), str(report.plain.instructions) if report.plain else "-"]


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write cuda_bounds.json")
    options = parser.parse_args(arguments)
    if cuda.nvcc() is None:
        print("there is no nvcc on the PATH; set NVCC or install the CUDA toolkit")
        return 1
    reports: dict[str, CudaReport] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # nvcc is a process
        for found in pool.map(cuda.compile_module, cuda.MODULES):
            reports |= found
    known = json.loads(BOUNDS.read_text(encoding="utf-8")) if BOUNDS.exists() else {}
    if options.update:
        known[cuda.release()] = {
            kernel: {name: [value, int(value * SLACK[0]) + SLACK[1]] for name, value in measures(report).items()}
            for kernel, report in reports.items()
        }
        store(known)
    bounds = known.get(cuda.release(), {})
    print(f"nvcc {cuda.release()}, sm_90a; per warp, one pass of a loop: 64 x 64 pairs of a warpgroup")
    print(aligned([HEAD, *(row(kernel, report) for kernel, report in reports.items())]))
    wrong = {kernel: broken(kernel, report, bounds.get(kernel)) for kernel, report in reports.items()}
    wrong = {kernel: problems for kernel, problems in wrong.items() if problems}
    for kernel, problems in wrong.items():
        print(f"WRONG {kernel}: {'; '.join(problems)}")
    print(f"{len(wrong)} of {len(reports)} kernels wrong" if wrong else "all within their bounds")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
