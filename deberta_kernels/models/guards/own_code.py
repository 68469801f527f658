"""Whether classes and modelling files run the code they were written with.

Asked when a model is patched and again at every call, since anybody may replace a forward, a method or a function of
the modelling file at any time. What is a class's own code is told by where it comes from, see `torch_state.originals`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from deberta_kernels.models.patched_class import original_function
from deberta_kernels.torch_state.originals import Originals, is_own

__all__ = ["replaced_function", "runs_own"]

# Functions of the modelling files that the attention and the encoders call; not every version has all of them.
_FUNCTIONS = (
    "make_log_bucket_position", "build_relative_position", "build_rpos", "scaled_size_sqrt", "compute_attention_span",
    "uneven_size_corrected", "c2p_dynamic_expand", "p2c_dynamic_expand", "pos_dynamic_expand",
)  # fmt: skip
# PyTorch's that the attention is made of: place, name and home as `is_own` knows it.
_OPERATORS = (
    *(
        (torch, name, "_VariableFunctionsClass")
        for name in (
            "bmm", "matmul", "gather", "clamp", "sqrt", "tensor", "arange", "sign", "abs", "log", "ceil", "where",
        )
    ),
    (nn.functional, "softmax", "torch.nn.functional"),
    *(
        (torch.Tensor, name, "TensorBase")
        for name in (
            "masked_fill", "softmax", "bool", "__invert__", "__truediv__", "__add__", "expand", "repeat", "permute",
            "transpose", "unsqueeze", "squeeze", "view", "contiguous", "chunk", "to", "long",
        )
    ),
)  # fmt: skip
# Layers of newer transformers checkpoint themselves inside their forward.
_CHECKPOINTING = "GradientCheckpointingLayer.__init_subclass__.<locals>.forward_with_checkpointing"


def runs_own(cls: type[nn.Module], prefixes: tuple[str, ...]) -> bool:
    """Tell whether a class runs the forward that some class in its ancestry was written with, in one of these packages.

    Args:
        cls: a class of modules; forwards of this package count as those that they replaced.
        prefixes: how the names of the packages' modules begin.
    """
    forward = found = original_function(cls, "forward")
    known = _own_forwards.get((cls, prefixes))
    if known is not None and known[0] is forward and known[1] is forward.__code__:
        return True
    while is_own(found, "transformers.modeling_layers", _CHECKPOINTING):  # one for each class on the way
        found = found.__closure__[found.__code__.co_freevars.index("forward")].cell_contents
    home = str(getattr(found, "__globals__", {}).get("__name__"))
    if is_own(found, "torch.nn.modules.module", "_forward_unimplemented"):
        is_theirs = str(cls.__module__).startswith(prefixes)  # a container, which is never called
    else:
        owners = (c for c in cls.__mro__ if c.__module__ == home)
        is_theirs = home.startswith(prefixes) and any(is_own(found, home, f"{c.__qualname__}.forward") for c in owners)
    if is_theirs and found is forward:  # what is below a checkpoint may change unseen
        _own_forwards[cls, prefixes] = forward, forward.__code__
    return is_theirs


# Class, packages -> its forward and the code of that, as they were found to be its own.
_own_forwards: dict[tuple[type[nn.Module], tuple[str, ...]], tuple[Any, Any]] = {}
_originals: dict[str, Originals] = {}


def replaced_function(home: str, author: str) -> str | None:
    """Return which function that the code of a modelling file calls somebody replaced; None if nobody did.

    Args:
        home: name of the file's module.
        author: name of the module of transformers that defines the functions.
    """
    originals = _originals.get(home)
    if originals is None:
        files = [sys.modules[name] for name in {author, home}]
        originals = _originals[home] = Originals(
            *((file, name, author, name) for file in files for name in _FUNCTIONS if hasattr(file, name)),
            *((place, name, operator_home, name) for place, name, operator_home in _OPERATORS),
            *((file, "torch", "torch", "") for file in files if hasattr(file, "torch")),
            *((file, "nn", "torch.nn", "") for file in files if hasattr(file, "nn")),
        )
    return originals.replaced()
