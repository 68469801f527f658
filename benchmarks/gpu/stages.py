"""The stages of a run, each in a process of its own that is started, watched, and started again without what broke it.

The process writes down each item as soon as it is known, one line of JSON per event: {"started": name} before an item,
{"finished": name, "result": {...}} after it. So a crash, a hang or a poisoned CUDA context costs one item.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Plan
from benchmarks.harness.process import environment, note, program

__all__ = ["KEPT_TEXT", "POISONED", "Item", "Stage", "read", "supervise", "work"]

# Exit status of a process whose device no longer answers.
POISONED = 3
KEPT_TEXT = 2000


@dataclass(frozen=True)
class Item:
    """One piece of a stage.

    Attributes:
        name: unique within the stage.
        run: returns what is kept of it, as JSON takes it; "ok": False says that something is wrong.
    """

    name: str
    run: Callable[[], dict[str, Any]]


def work(items: Iterable[Item], path: Path, skip: frozenset[str], healthy: Callable[[], bool]) -> int:
    """Run the items that are not skipped and append their results to a file.

    Args:
        items: in order of importance.
        path: file of JSON lines.
        skip: names that a process before this one has dealt with.
        healthy: tells whether the device still answers; asked after a failure.

    Returns:
        exit status: 0, or `POISONED` when the rest must be run by another process.
    """
    with path.open("a", encoding="utf-8") as lines:

        def write(value: dict[str, Any]) -> None:
            lines.write(json.dumps(value) + "\n")
            lines.flush()

        for item in items:
            if item.name in skip:
                continue
            write({"started": item.name})
            start = time.perf_counter()
            try:
                result = item.run()
            except Exception as error:  # whatever it is, the other items still count
                result = {"ok": False, **explain(error)}
            seconds = round(time.perf_counter() - start, 2)
            write({"finished": item.name, "result": {"seconds": seconds, **result}})
            failed = result.get("ok") is False
            note(f"{'FAILED ' if failed else ''}{item.name}, {seconds} s{': ' + _reason(result) if failed else ''}")
            if failed and not healthy():
                return POISONED
    return 0


def explain(error: BaseException) -> dict[str, str]:
    """Return what is kept of an exception."""
    text = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}"[:KEPT_TEXT], "traceback": text[-KEPT_TEXT:]}


def _reason(result: dict[str, Any]) -> str:
    return str(result.get("error") or result.get("text") or "").replace("\n", " | ")[:300]


def read(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the finished items by name, and the item that was started and not finished, or ""."""
    finished: dict[str, dict[str, Any]] = {}
    started = ""
    if not path.exists():
        return finished, started
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # the process was stopped in the middle of a line
            continue
        if "started" in value:
            started = value["started"]
        else:
            finished[value["finished"]] = value["result"]
            started = ""
    return finished, started


WORKER = program("gpu")
POLL = 0.5
# A process that broke this often is broken itself, not its items.
MOST_STARTS = 6


@dataclass(frozen=True)
class Stage:
    """One part of a run.

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
