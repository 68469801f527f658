"""The public import path of `adapters`, and earlier names of modules, which pickles made by release 0.1 hold."""

import sys
from types import ModuleType

from deberta_kernels.models import adapterhub, dense, fused, patched_class
from deberta_kernels.models.standalone import mask_decoder


def _name(earlier: str, *modules: ModuleType) -> None:
    """Let a module be found by an earlier name, with what lay in it and now lies in several."""
    module = ModuleType(f"{__name__}.{earlier}") if len(modules) > 1 else modules[0]
    if len(modules) > 1:
        for found in modules:
            vars(module).update({name: vars(found)[name] for name in found.__all__})
    sys.modules[f"{__name__}.{earlier}"] = module


_name("dense", dense, adapterhub)
_name("huggingface", fused, adapterhub)
_name("mask_decoder", mask_decoder)
_name("swap", patched_class)
