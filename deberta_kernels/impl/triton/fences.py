"""Proxy fences that Triton 3.6 forgets, put into the kernels it compiles.

`cp.async` writes shared memory through the generic proxy, the matrix units of newer devices read it through the async
proxy, and only a fence lets them see what was written. Triton has one in its pipelined loops since 3.7, see
https://github.com/triton-lang/triton/pull/9610. Before, none can be written in the source of a kernel: the pipeliner
moves or refuses what it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs

__all__ = ["let_triton_add", "needed"]

_FORGOTTEN = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
# The matrix units of other devices read registers.
_READ_SHARED_MEMORY = ("sm_90", "sm_100", "sm_103")
_WAIT = re.compile(r"cp\.async\.wait_(?:group\s+\d+|all)\s*;")


def needed(device_key: str, num_stages: int) -> bool:
    """Return whether a kernel lacks fences as Triton compiles it; a pipeline of one stage copies through registers."""
    return _FORGOTTEN and device_key in _READ_SHARED_MEMORY and num_stages > 1


def let_triton_add() -> None:
    """Make Triton put a fence behind every wait for asynchronous copies in this package's kernels.

    It keeps what it compiles under the source and the constants of a kernel, and knows nothing of this: a kernel that
    needs fences needs a constant that says so.
    """
    other = knobs.runtime.add_stages_inspection_hook
    if not isinstance(other, _Hook):
        knobs.runtime.add_stages_inspection_hook = _Hook(other)


class _Hook:
    """What Triton calls with the stages of a compilation, behind what it would call otherwise."""

    def __init__(self, other: Callable[..., Any] | None) -> None:
        self._other = other

    def __call__(self, backend: Any, stages: dict[str, Any], options: Any, language: Any, capability: Any) -> None:
        if self._other is not None:
            self._other(backend, stages, options, language, capability)
        compiled = stages.get("ptx")
        if compiled is None:  # of another maker's device
            return

        def fenced(source: Any, metadata: dict[str, Any]) -> str:
            text: str = compiled(source, metadata)
            if capability < 90 or not metadata["name"].startswith("_disentangled"):
                return text
            return _WAIT.sub("\\g<0>\n\tfence.proxy.async.shared::cta;", text)

        stages["ptx"] = fenced
