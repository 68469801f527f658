"""Tell whether the native library runs under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-sanitized`."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from deberta_kernels import native

__all__ = ["absence", "reporting_here"]


def reporting_here() -> dict[str, str]:
    """Return the environment of a process whose reports a test expects, on its standard error."""
    names = ("ASAN_OPTIONS", "UBSAN_OPTIONS")
    return os.environ | {name: f"{os.environ.get(name, '')}:log_path=stderr" for name in names}


def absence() -> str | None:
    """Return why this process watches nothing, or None where the open library is watched by both sanitizers."""
    if not hasattr(ctypes.CDLL(None), "__asan_init"):
        return "the runtime of AddressSanitizer is not loaded"
    library = native.opened()
    if library is None:
        return str(native.unavailable())
    content = Path(library.path).read_bytes()
    missing = [name for name in (b"__asan_report_load", b"__ubsan_handle") if name not in content]
    return f"{library.path} was built without sanitizers" if missing else None
