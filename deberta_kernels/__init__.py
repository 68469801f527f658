"""Fused disentangled attention for DeBERTa-v2 and v3: a functional interface and a patch for existing models.

Names are loaded on first use, so that importing the package loads neither torch extensions, transformers, triton nor
the native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import disentangled_attention, disentangled_attention_varlen, explain
    from .models.patching import PatchReport, patch, patch_all, unpatch, unpatch_all
    from .models.standalone.mask_decoder import EnhancedMaskDecoder
    from .models.standalone.self_attention import DisentangledSelfAttention
    from .notices import DebertaKernelsWarning, reset_stats, stats

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
    "DebertaKernelsWarning": ".notices",
    "DisentangledSelfAttention": ".models.standalone.self_attention",
    "EnhancedMaskDecoder": ".models.standalone.mask_decoder",
    "PatchReport": ".models.patching",
    "disentangled_attention": ".api",
    "disentangled_attention_varlen": ".api",
    "explain": ".api",
    "patch": ".models.patching",
    "patch_all": ".models.patching",
    "reset_stats": ".notices",
    "stats": ".notices",
    "unpatch": ".models.patching",
    "unpatch_all": ".models.patching",
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
