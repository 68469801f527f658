"""Fused disentangled attention for DeBERTa-v2 and v3: a functional interface and a patch for existing models.

Names are loaded on first use, so that importing the package loads neither torch extensions, transformers, triton nor
the native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import disentangled_attention, disentangled_attention_varlen, explain
    from .dispatch import DebertaKernelsWarning, reset_stats, stats
    from .integrations.mask_decoder import EnhancedMaskDecoder
    from .modules.self_attention import DisentangledSelfAttention
    from .patching import PatchReport, patch, patch_all, unpatch, unpatch_all

__version__ = "0.1.0"

__all__ = [
    "DebertaKernelsWarning",
    "DisentangledSelfAttention",
    "EnhancedMaskDecoder",
    "PatchReport",
    "__version__",
    "disentangled_attention",
    "disentangled_attention_varlen",
    "explain",
    "patch",
    "patch_all",
    "reset_stats",
    "stats",
    "unpatch",
    "unpatch_all",
]

_HOME = {
    "DebertaKernelsWarning": ".dispatch",
    "DisentangledSelfAttention": ".modules.self_attention",
    "EnhancedMaskDecoder": ".integrations.mask_decoder",
    "PatchReport": ".patching",
    "disentangled_attention": ".api",
    "disentangled_attention_varlen": ".api",
    "explain": ".api",
    "patch": ".patching",
    "patch_all": ".patching",
    "reset_stats": ".dispatch",
    "stats": ".dispatch",
    "unpatch": ".patching",
    "unpatch_all": ".patching",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
