"""The kernels under the tools that watch them: compute-sanitizer for bad accesses and races, ncu for counters."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.core.candidates import draw, ours
from benchmarks.gpu.cases import asked, is_for
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import KEPT_TEXT, Item
from benchmarks.harness.process import environment, program
from benchmarks.registry import Shape
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import Case

__all__ = ["KERNELS", "counter_items", "hazards", "run_profiled", "run_small", "sanitizer_items"]

# Parts of the names of this package's kernels: torch's own are not watched, which would take minutes.
KERNELS = ("disentangled",)
TOOLS = ("memcheck", "racecheck")
FOUND = 9
NOT_HERE = ("Device not supported", "LibraryNotLoaded", "Unable to find injection library", "ERR_NVGPUCTRPERM")
# Sections of Nsight Compute that say what bounds a kernel, and the counters of shared memory and L2 beside them.
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
COUNTERS = (
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "lts__t_bytes.sum",
    "smsp__inst_executed_op_local.sum",
)
# ncu runs every watched kernel many times; these two lengths show the near loop and the far loop.
PROFILED = ((32, 512), (4, 4096))
KEPT_REPORT = 60_000


def sanitizer_items(plan: Plan) -> list[Item]:
    """Return one item per tool of compute-sanitizer; it says why where there is none."""
    return [Item(tool, lambda tool=tool: _sanitized(plan, tool)) for tool in TOOLS]


def _sanitized(plan: Plan, tool: str) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or plan.device == "cpu":
        return {"ok": True, "skipped": "no compute-sanitizer on PATH" if program is None else "no device"}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    command += ["--launch-timeout", "0", *(part for name in KERNELS for part in ("--kernel-name", f"kns={name}"))]
    if tool == "racecheck":
        # Every hazard with the values it is about, since equal ones are told apart below.
        command += ["--racecheck-report", "hazard", "--print-limit", "0"]
    # Without torch's pool every tensor is an allocation of its own, so that running past its end shows.
    status, text = _run([*command, *_this("--small", plan)], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if reason := _reason(text):
        return {"ok": True, "skipped": f"compute-sanitizer does not work here: {reason}"}
    ran = [line for line in text.splitlines() if line.startswith("ran ")]
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    absent = [name for name in asked(plan) if not any(re.match(rf"ran [1-9]\d* cases of {name}$", x) for x in ran)]
    equal, others = hazards(text)
    harmless = status == FOUND and equal > 0 and not others and _displayed(summary) == equal
    ok = (status == 0 or harmless) and not others and not absent
    kept = "" if ok else text[:KEPT_TEXT] + text[-KEPT_TEXT:]
    kept = "".join([f"no case of {name} ran\n" for name in absent] + [f"{hazard}\n" for hazard in others[:8]]) + kept
    return {"ok": ok, "summary": summary, "ran": ran, "equal_writes": equal, "text": kept}


def hazards(text: str) -> tuple[int, list[str]]:
    """Return how many hazards of racecheck are two writes of one value, and what is said of all others.

    Where several warps hold the same part of a tile, Triton lets each of them store it: whichever comes last, memory
    holds that value. A read beside a write, other values, and copies that are not waited for are no such case.
    """
    equal, others = 0, []
    for part in re.split(r"(?=Potential (?:WAW|WAR|RAW) hazard)", text)[1:]:
        values = re.search(r"Current Value\s*:\s*(\S+?)\s*,\s*Incoming Value\s*:\s*(\S+)", part)
        same = values is not None and values[1] == values[2]
        if part.startswith("Potential WAW") and same and "invalid memcpy_async" not in part:
            equal += 1
        else:
            others.append(" ".join(part.replace("=", " ").split())[:300])
    return equal, others


def _displayed(summary: list[str]) -> int:
    """Return how many hazards racecheck counts itself: none may be missing among those that were read."""
    return sum(int(x[1]) for line in summary if (x := re.search(r"(\d+) hazards? displayed", line)))


def counter_items(plan: Plan) -> list[Item]:
    """Return one item per profiled shape; it says why where there is no Nsight Compute."""
    return [Item(f"{batch}x{length}", lambda b=batch, n=length: _profiled(plan, b, n)) for batch, length in PROFILED]


def _profiled(plan: Plan, batch: int, length: int) -> dict[str, Any]:
    program = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if program is None or plan.device == "cpu":
        return {"ok": True, "skipped": "no ncu on PATH" if program is None else "no device"}
    base = [program, "--clock-control", "none", "--target-processes", "application-only"]
    base += ["--kernel-name", f"regex:{'|'.join(KERNELS)}", *(x for name in SECTIONS for x in ("--section", name))]
    ours_ = _this("--profiled", plan, f"{batch}x{length}")
    status, text = _run([*base, "--metrics", ",".join(COUNTERS), *ours_])
    if status:  # a counter that this device or this ncu does not know fails the whole
        status, text = _run([*base, *ours_])
    if reason := _reason(text):
        return {"ok": True, "skipped": f"ncu reads no counters here: {reason}"}
    return {"ok": status == 0, "report": text[-KEPT_REPORT:], "text": "" if status == 0 else text[-KEPT_TEXT:]}


def _this(flag: str, plan: Plan, value: str = "") -> list[str]:
    return [*program("gpu"), "--plan", plan.as_text(), flag, *([value] if value else [])]


def _run(command: list[str], **values: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment(**values),
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _reason(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if any(part in line for part in NOT_HERE)), "")


def run_small(plan: Plan) -> int:
    """Run small problems forward and backward, without comparing: the tool around this process does the watching."""
    half = torch.bfloat16
    found = [
        Case(batch=1, heads=2, nq=200, dtype=half),
        Case(batch=2, heads=1, nq=150, dtype=half, mask="holes"),
        Case(batch=1, heads=1, nq=100, dtype=half, mask="sparse"),
        Case(batch=3, heads=1, nq=100, dtype=half, packed=True, dropout_p=0.1),
        Case(batch=1, heads=1, nq=1100, dtype=torch.float16),
        Case(batch=1, heads=1, nq=77, nk=130, dtype=torch.float32, head_dim=40),
    ]
    for backend in asked(plan):
        target = Target(backend, backend, (half, torch.float16, torch.float32), device=plan.device)
        ran = 0
        for case in found:
            if not is_for(backend, case):
                continue
            problem = inputs.problem(case, plan.device)
            budget.evaluate(target.run, problem, inputs.dout(case, problem))
            ran += 1
        if plan.device != "cpu":
            torch.cuda.synchronize()
        print(f"ran {ran} cases of {backend}", flush=True)
    return 0


def run_profiled(plan: Plan, label: str) -> int:
    """Run one forward and backward of a shape, "BxN", with the kernels compiled before."""
    batch, length = (int(part) for part in label.split("x"))
    leaves = draw(Shape(batch, length, plan.dtype, True), device=plan.device).requiring_grad()
    torch.autograd.grad(ours(leaves, plan.backend, prepare=False)(), leaves.leaves, leaves.dout)
    if plan.device != "cpu":
        torch.cuda.synchronize()
    return 0
