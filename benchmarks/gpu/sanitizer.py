"""Run small shapes under compute-sanitizer: accesses out of bounds, and races between the threads of a program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.items import KEPT_TEXT, Item
from gpu.plan import Plan

__all__ = ["TOOLS", "items", "run_cases"]

TOOLS = ("memcheck", "racecheck")
WORKER = Path(__file__).resolve().parent.parent / "bench_gpu.py"
# Only kernels whose names have this in them are watched: the rest is torch's, and slow to watch.
KERNELS = "kns=disentangled"
FOUND = 9
NOT_HERE = ("Device not supported", "LibraryNotLoaded", "Unable to find injection library")


def items(plan: Plan) -> list[Item]:
    """Return one item per tool; it says why where there is none."""
    return [Item(tool, lambda tool=tool: _sanitized(plan, tool)) for tool in TOOLS]


def _sanitized(plan: Plan, tool: str) -> dict[str, Any]:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None or plan.device == "cpu":
        return {"ok": True, "skipped": "no compute-sanitizer on PATH" if sanitizer is None else "no device"}
    command = [sanitizer, "--tool", tool, "--kernel-regex", KERNELS, "--error-exitcode", str(FOUND)]
    command += [sys.executable, str(WORKER), "--sanitized", "--plan", plan.as_text()]
    # Without torch's pool every tensor is an allocation of its own, so that running past its end shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, check=False
    )
    text = done.stdout + done.stderr
    if any(reason in text for reason in NOT_HERE):
        return {"ok": True, "skipped": f"compute-sanitizer does not work here: {text[-300:]}"}
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    ran = [line for line in text.splitlines() if line.startswith("ran ")]
    ok = done.returncode == 0 and bool(ran)
    return {"ok": ok, "summary": summary, "ran": ran, "text": "" if ok else text[:KEPT_TEXT] + text[-KEPT_TEXT:]}


def run_cases(plan: Plan) -> int:
    """Run small problems forward and backward, without comparing: the tool around this process does the watching."""
    import torch

    from deberta_kernels.testing import budget, inputs
    from deberta_kernels.testing.backends import Target
    from deberta_kernels.testing.inputs import Case

    half = torch.bfloat16
    found = [
        Case(batch=1, heads=2, nq=200, dtype=half),
        Case(batch=2, heads=1, nq=150, dtype=half, mask="holes"),
        Case(batch=3, heads=1, nq=100, dtype=half, packed=True, dropout_p=0.1),
        Case(batch=1, heads=1, nq=1100, dtype=torch.float16),
        Case(batch=1, heads=1, nq=77, nk=130, dtype=torch.float32, head_dim=40),
    ]
    target = Target(plan.backend, plan.backend, (half, torch.float16, torch.float32), device=plan.device)
    for case in found:
        problem = inputs.problem(case, plan.device)
        budget.evaluate(target.run, problem, inputs.dout(case, problem))
    if plan.device != "cpu":
        torch.cuda.synchronize()
    print(f"ran {len(found)} cases", flush=True)
    return 0
