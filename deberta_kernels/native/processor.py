"""What the operating system says about the processor."""

from __future__ import annotations

import platform
from functools import cache

__all__ = ["described", "features", "model", "vendor"]


def model() -> str:
    """Return the processor's name."""
    return described().get("model name") or platform.processor() or platform.machine()


def vendor() -> str | None:
    """Return the maker's name in an x86 processor, as "GenuineIntel"; None elsewhere or where it is unknown."""
    return described().get("vendor_id")


@cache
def features() -> frozenset[str]:
    """Return the names of its instruction-set extensions; empty where they are unknown."""
    entries = described()
    return frozenset((entries.get("flags") or entries.get("Features") or "").split())


@cache
def described() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo; nothing where there is no such file."""
    entries: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, separator, value = line.partition(":")
                if separator:
                    entries.setdefault(key.strip(), value.strip())
                elif entries:
                    break
    except OSError:
        pass
    return entries
