"""Which tests share a process: those that run one variant of a kernel, so that it is compiled once.

By what a test is called, and not by pytest-xdist's groups, which pytest 9.2 does not see.
"""

from __future__ import annotations

import re
from typing import Any

from deberta_kernels.testing.inputs import KEY_MASKS, PAIR_MASKS

__all__ = ["make_scheduler", "variant"]

_CASE = re.compile(r"-(D\d+)-(bf16|fp16|fp32)-(c2p\+p2c|c2p|p2c|none)(?=[-\]])")
_KEY_MASKS = frozenset(KEY_MASKS) | {f"{mask}_tokens" for mask in KEY_MASKS}


def variant(test: str) -> str | None:
    """Return what Triton compiles for a test, by the case and the architecture in its id, or None if it says neither.

    That is: architecture, head dimension, dtype, whether there are positions, the kind of the mask, and dropout.
    """
    case, architecture = _CASE.search(test), re.search(r"sm_\d+", test)
    if case is None or architecture is None:
        return None
    head_dim, dtype, terms = case.groups()
    features = set(test[case.end() :].rstrip("]").split("-"))
    mask = "pairs" if features & set(PAIR_MASKS) else "tokens" if features & _KEY_MASKS else "unmasked"
    dropout = any(feature.startswith("dropout") for feature in features)
    return " ".join((architecture[0], head_dim, dtype, str(terms != "none"), mask, str(dropout)))


def make_scheduler(config: Any, log: Any) -> Any:
    """Return what pytest-xdist asks which process runs which tests."""
    from xdist.scheduler import LoadScopeScheduling

    class ByVariant(LoadScopeScheduling):  # type: ignore[misc]
        """Tests of one variant together, all others one by one."""

        def _split_scope(self, nodeid: str) -> str:
            return variant(nodeid) or nodeid

    return ByVariant(config, log)
