"""Write down what a benchmark found: progress on stderr, the result as JSON, with what is needed to compare it."""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.process import ROOT

__all__ = ["note", "preamble", "store"]

RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1


def note(text: str) -> None:
    """Show progress, apart from the results on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def preamble(kind: str, threads: int, backend: str, *, quick: bool) -> dict[str, Any]:
    """Return the part of a result that says what was measured when, where, with what and how."""
    from benchmarks.harness import machine

    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "device": machine.device_name(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "library": {key: value for key, value in machine.library().items() if key != "path"},
        "settings": {
            "threads": threads,
            "backend": backend,
            "quick": quick,
            "clock": "process CPU time" if threads == 1 else "wall clock",
        },
    }


def store(result: dict[str, Any], where: str) -> None:
    """Write the JSON file.

    Args:
        result: begins as `preamble` says.
        where: a file; "" for benchmarks/results/<device>/<kind>-<date>-<commit>.json; "-" for nowhere.
    """
    if where == "-":
        return
    stamp = result["date"][:19].replace(":", "").replace("T", "-")
    isa = result["settings"].get("isa")
    name = f"{result['kind']}-{stamp}-{(result['commit']['id'] or 'unknown')[:8]}{'-' + isa if isa else ''}.json"
    path = Path(where) if where else RESULTS / result["device"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    note(f"written: {path}")
