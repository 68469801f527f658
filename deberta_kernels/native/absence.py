"""Why there is no native library, or not its best variant, and what to do about it: the one place that says so.

The build leaves its reason in lib/build.json, beside the place of the library. Nothing here needs torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels import env
from deberta_kernels.native import processor

__all__ = ["INSTALLED", "build_record", "not_built", "slower_variant", "unusable"]

_DISTRIBUTED = "deberta_kernels"


def _package() -> Path:
    """Return where the package with the library is: this one; for a copy of another name, the one that is installed."""
    found = importlib.util.find_spec(_DISTRIBUTED) if PACKAGE != _DISTRIBUTED else None
    if found is None or found.origin is None:
        return Path(__file__).resolve().parents[1]
    return Path(found.origin).resolve().parent


_PACKAGE = _package()
INSTALLED = _PACKAGE / "lib" / "libdeberta_kernels_cpu.so"
# Without the last option pip would take the wheel that it made of the same sources before.
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir deberta-kernels"
_LONGEST_REASON = 300  # of a failed build: the rest is the compiler's, and pip shows it with -v


def build_record() -> dict[str, Any]:
    """Return what the build of the installed library wrote down, see csrc/native_build.py; nothing where it did not."""
    try:
        found = json.loads(INSTALLED.with_name("build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def not_built(path: str) -> str:
    """Return why there is no file at the path, and what to do."""
    if path != str(INSTALLED):
        return f"the native library {path} is missing; {_leave_it()}"
    if PACKAGE != _DISTRIBUTED and Path(__file__).resolve().parents[1] == _PACKAGE:
        return "this copy of the package has no native library; `pip install deberta-kernels`, whose library it takes"
    reason = build_record().get("not_built")
    if not isinstance(reason, str) or not reason:
        reason = f"{path} is missing; install a C++ compiler (Debian, Ubuntu: `apt install g++`)"
    if len(reason) > _LONGEST_REASON:
        reason = reason[:_LONGEST_REASON].rstrip() + " ..."
    return f"the native library is not built: {reason}; then `{_build_command()}`"


def unusable(path: str, why: str) -> str:
    """Return why the file at the path is of no use, and what to do."""
    other = f", or {_leave_it()}" if path != str(INSTALLED) else ""
    return f"the native library {path} cannot be used: {why}; build it again with `{_build_command()}`{other}"


def slower_variant(isa: str, compiled: Collection[str]) -> str:
    """Return why the variant in use is not a faster one, or "" where it is the one meant for this processor.

    Args:
        isa: the variant in use.
        compiled: those in the library.
    """
    faster = [
        name for name in env.CPU_ISAS[: env.CPU_ISAS.index(isa)] if processor.features() >= {*env.ISA_FEATURES[name]}
    ]
    if env.cpu_isa() == isa and faster:
        return f"{env.CPU_ISA} asks for it"
    lacking = [name for name in faster if name not in compiled]
    if lacking:
        return f"the library was compiled without {lacking[0]}; update the C++ compiler, then `{_build_command()}`"
    is_x86 = processor.vendor() is not None
    return "this processor has no AVX2, the library is slow on it" if isa == "generic" and is_x86 and not faster else ""


def _leave_it() -> str:
    return f"unset {env.LIBRARY} for the installed library"


def _build_command() -> str:
    in_checkout = (_PACKAGE.parent / "csrc" / "native_build.py").is_file()
    return "python setup.py build_native" if in_checkout else _REINSTALL
