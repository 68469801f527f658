"""Programs of this package in processes of their own, and the files they leave."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "environment", "file_name", "note", "now", "program", "run_alone", "write_json"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def note(text: str) -> None:
    """Show progress, apart from the results on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def now() -> str:
    """Return the time as results have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def file_name(kind: str, result: dict[str, Any], *more: str) -> str:
    """Return KIND-DATE-COMMIT.json of a result, with more behind it."""
    stamp = result["date"][:19].replace(":", "").replace("T", "-")
    return "-".join((kind, stamp, (result["commit"]["id"] or "unknown")[:8], *more)) + ".json"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a file that is whole at any time, however often it is written anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(".partial")
    half_written.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    half_written.replace(path)


def program(*arguments: str) -> list[str]:
    """Return the command `python -m benchmarks ARGUMENTS`; it needs `environment()`."""
    return [sys.executable, "-m", "benchmarks", *arguments]


def environment(**values: str) -> dict[str, str]:
    """Return this process's environment with the checkout on the path, and some values beside."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **values}


def run_alone(function: Callable[..., dict[str, Any]], threads: int, **arguments: Any) -> dict[str, Any]:
    """Call a function of a module in a process of its own, with values that JSON has; return its result.

    Returns:
        what the function returns, or {"error": text}.
    """
    given = [f"{function.__module__}:{function.__name__}", str(threads), json.dumps(arguments)]
    command = [sys.executable, "-m", "benchmarks.harness.process", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit status {done.returncode}: {last}"}
    return dict(json.loads(lines[-1]))


def main(function: str, threads: str, arguments: str) -> None:
    """Call a function as `run_alone` says, and print its result."""
    import torch

    torch.set_num_threads(int(threads))
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**json.loads(arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
