"""Run the items of one stage in a process of its own, and write down each as soon as it is known.

One line of JSON per event: {"started": name} before an item, {"finished": name, "result": {...}} after it. So a crash,
a hang or a poisoned CUDA context costs one item: whoever started the process sees which, and starts another without it.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["POISONED", "Item", "note", "read", "work"]

# Exit status of a process whose device no longer answers.
POISONED = 3
KEPT_TEXT = 2000


@dataclass(frozen=True)
class Item:
    """Name one piece of a stage.

    Attributes:
        name: unique within the stage.
        run: returns what is kept of it, as JSON takes it; "ok": False says that something is wrong.
    """

    name: str
    run: Callable[[], dict[str, Any]]


def note(text: str) -> None:
    """Show progress, apart from the results on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


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
