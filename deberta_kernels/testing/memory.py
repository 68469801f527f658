"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["free", "peak", "reset_high_water", "status"]


def status(field: str) -> int:
    """Return a field of /proc/self/status, such as "VmRSS" or "VmHWM", in bytes.

    Raises:
        RuntimeError: there is no such field, or no /proc.
    """
    return _field(Path("/proc/self/status"), field)


def free() -> int:
    """Return the bytes that could be allocated without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _field(path: Path, field: str) -> int:
    with suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no {field}; memory is measured on Linux only.")


def reset_high_water() -> None:
    """Give freed memory back, and let the high-water mark begin anew at what is held now.

    Raises:
        OSError: this system does not let a process do that.
    """
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: freed pages would be reused unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(call: Callable[[], list[Any]]) -> dict[str, Any]:
    """Return the high-water mark of one call above what the process held before, less the bytes of what it returns.

    Args:
        call: returns the tensors that are results; something smaller should have been run before, so that libraries are
            loaded and threads started.
    """
    reset_high_water()
    before = status("VmRSS")
    results = call()
    highest = status("VmHWM")
    returned = sum(x.numel() * x.element_size() for x in results)
    return {"bytes": highest - before - returned, "returned": returned, "held_before": before}
