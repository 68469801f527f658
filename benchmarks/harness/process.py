"""Programs of this package in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "environment", "note", "program", "run_alone"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def note(text: str) -> None:
    """Show progress, apart from the results on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def program(*arguments: str) -> list[str]:
    """Return the command `python -m benchmarks ARGUMENTS`; it needs `environment()`."""
    return [sys.executable, "-m", "benchmarks", *arguments]


def environment(**values: str) -> dict[str, str]:
    """Return this process's environment with the checkout on the path, and some values beside."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **values}


def run_alone(module: str, arguments: list[str]) -> dict[str, Any]:
    """Run a module that prints JSON in a process of its own; return that, or {"error": text}."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit status {done.returncode}: {last}"}
    return dict(json.loads(lines[-1]))
