"""Tell whether the native library is the one for aarch64 on an emulated processor: `make test-aarch64`."""

from __future__ import annotations

import os

from deberta_kernels import env, native

__all__ = ["WORKER", "absence"]

# What proxy.cpp starts.
WORKER = "EMULATED_WORKER"


def absence() -> str | None:
    """Return why no processor is emulated, or None where the open library hands its calls to one."""
    if WORKER not in os.environ:
        return f"{WORKER} is not set"
    status = native.library_status()
    if not status["loaded"]:
        return str(status["reason"])
    wanted = {*env.isas_of("aarch64")}
    return None if wanted == {*status["compiled"]} else f"{status['path']} has {', '.join(status['compiled'])}"
