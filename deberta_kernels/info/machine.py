"""The processor and the GPUs as the operating system shows them."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

from deberta_kernels import env
from deberta_kernels.native import processor

__all__ = ["gpus", "processor_found"]

# The features that decide which variant of the native library runs.
_CPU_FEATURES = (*dict.fromkeys(chain(*(env.ISA_FEATURES[isa] for isa in reversed(env.CPU_ISAS)))), "sve")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_NVIDIA = Path("/proc/driver/nvidia/gpus")


def processor_found() -> dict[str, Any]:
    """Return "name", "model", "features", "cores" (that this process may use), "logical", "affinity" and "quota"."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "name": processor.everyday_name(),
        "model": processor.model(),
        "features": [feature for feature in _CPU_FEATURES if feature in processor.features()],
        "cores": len(allowed) or os.cpu_count(),
        "logical": os.cpu_count(),
        "affinity": _ranges(allowed),
        "quota": _quota(),
    }


def _quota() -> float | None:
    """Return how many processors' time a container's limit leaves to this process, None without a limit."""
    try:
        most, period = _QUOTA.read_text(encoding="ascii").split()
        return None if most == "max" else round(int(most) / int(period), 2)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as "0-3,8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def gpus() -> list[str]:
    """Return the names of NVIDIA's GPUs by the driver's own listing: what there is to see without torch."""
    found = []
    for path in sorted(_NVIDIA.glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return found
