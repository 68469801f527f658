"""What is wrong with a run: the one place that decides its exit status."""

from __future__ import annotations

from typing import Any

__all__ = ["problems"]

# Stages in which every backend that is asked for has to run, and which candidate each is there.
_PROVING = "correctness"
_TIMING = ("core", "rivals", "compiled")
_OUT_OF_TIME = ("stopped after", "no time left")


def problems(result: dict[str, Any]) -> list[str]:
    """Return what is wrong, a line each: wrong answers, what broke, and what was asked for and did not run.

    A stage that ran out of time is none as long as something of everything that was asked for ran.
    """
    found = []
    for name, record in result["stages"].items():
        items = record["items"]
        found += [f"{name}: {item} failed" for item, one in items.items() if one.get("ok") is False]
        ran = {item: one for item, one in items.items() if "unfinished" not in one}
        if record["broken"] and not record["broken"].startswith(_OUT_OF_TIME):
            found.append(f"{name}: broke off: {record['broken'][:300]}")
        elif not ran:
            found.append(f"{name}: nothing of it ran: {record['broken'] or 'it has no items'}")
        if name == _PROVING:
            proven = {one.get("backend") for one in ran.values()}
            found += [f"{name}: backend {backend} did not run" for backend in result["asked"] if backend not in proven]
        if name in _TIMING:
            found += [f"{name}: {candidate} was never timed: {why}" for candidate, why in _untimed(ran).items()]
    return found


def _untimed(items: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the candidates that were asked for and have no time at any shape, with a reason; memory may lack."""
    timed = {name for one in items.values() for name in one.get("samples", {})}
    found: dict[str, str] = {}
    for one in items.values():
        for name in set(one.get("asked", ())) - timed:
            reason = one.get("reasons", {}).get(name, "no reason is known")
            found[name] = found.get(name, "out of memory") if reason == "out of memory" else reason[:200]
    return {name: why for name, why in sorted(found.items()) if why != "out of memory"}
