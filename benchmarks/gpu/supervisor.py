"""Start the process of a stage, watch it, start it again without the item that broke it, and keep what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.items import KEPT_TEXT, note, read
from benchmarks.gpu.plan import Plan
from benchmarks.harness.process import environment, program

__all__ = ["Stage", "supervise"]

WORKER = program("gpu")
POLL = 0.5
# A process that broke this often is broken itself, not its items.
MOST_STARTS = 6


@dataclass(frozen=True)
class Stage:
    """Name one part of a run.

    Attributes:
        name: as on the command line and in the JSON.
        seconds: limit of the whole stage, in seconds.
        item_seconds: limit of one item, in seconds; a hang costs no more.
    """

    name: str
    seconds: float
    item_seconds: float = 60.0


def supervise(stage: Stage, plan: Plan, seconds: float, changed: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run one stage to its end or to its limit.

    Args:
        stage: which.
        plan: settings of the run.
        seconds: limit, at most that of the stage.
        changed: called with the record whenever an item is finished.

    Returns:
        {"items": {name: result}, "seconds": ..., "complete": whether every item was tried, "broken": why not}.
    """
    started = time.monotonic()
    record: dict[str, Any] = {"items": {}, "seconds": 0.0, "complete": False, "broken": ""}
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "items.jsonl", Path(folder) / "log.txt"
        for _ in range(MOST_STARTS):
            status = _watch(stage, plan, started + seconds, lines, log, record, changed)
            finished, broken_item = read(lines)
            record["items"] = finished
            if status == 0:
                record["complete"] = True
                break
            if broken_item:
                text = log.read_text(encoding="utf-8", errors="replace")[-KEPT_TEXT:]
                reason = {"time": "took too long", "limit": "the stage's time was up"}.get(str(status), "crashed")
                result = {"ok": status == "limit", "error": f"{reason} (status {status})", "log": text}
                if status == "limit":  # not wrong, merely unfinished
                    result["unfinished"] = True
                _append(lines, broken_item, result)
                record["items"], _ = read(lines)
            if status == "limit":
                record["broken"] = f"stopped after {seconds:.0f} s"
                break
            if not broken_item and status not in ("time", 3):
                record["broken"] = f"exit status {status}: {_tail(log)}"
                break
        else:
            record["broken"] = f"given up after {MOST_STARTS} starts: {_tail(log)}"
    record["seconds"] = round(time.monotonic() - started, 1)
    changed(record)
    return record


def _watch(
    stage: Stage,
    plan: Plan,
    deadline: float,
    lines: Path,
    log: Path,
    record: dict[str, Any],
    changed: Callable[[dict[str, Any]], None],
) -> int | str:
    """Return the exit status, "limit" when the stage ran out of time, or "time" when one item did."""
    skip, _ = read(lines)
    command = [*WORKER, "--worker", stage.name, "--plan", plan.as_text(), "--lines", str(lines)]
    for name in skip:
        command += ["--skip", name]
    seen, last = len(skip), time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment())
        shown = log.stat().st_size if log.exists() else 0
        try:
            while process.poll() is None:
                time.sleep(POLL)
                shown = _show(log, shown)
                finished, _ = read(lines)
                now = time.monotonic()
                if len(finished) != seen:
                    seen, last = len(finished), now
                    record["items"] = finished
                    changed(record)
                if now > deadline:
                    return "limit"
                if now - last > stage.item_seconds:
                    return "time"
        finally:
            _stop(process)
            _show(log, shown)
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _show(log: Path, shown: int) -> int:
    with log.open("rb") as stream:
        stream.seek(shown)
        text = stream.read()
    sys.stderr.write(text.decode("utf-8", errors="replace"))
    sys.stderr.flush()
    return shown + len(text)


def _append(lines: Path, name: str, result: dict[str, Any]) -> None:
    with lines.open("a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps({"finished": name, "result": result}) + "\n")
    note(f"{name}: {result['error']}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-KEPT_TEXT:].strip()
