"""What a patched encoder may hand to a layer, decided at every call: the one place that does.

A layer gets the package's own mask object, or packed states, only where nothing but Hugging Face's known code and this
package's can see them. Every other layer gets what Hugging Face's encoder would hand over, tensor for tensor.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from torch import Tensor, nn

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels.models.anatomy import VERSION_ONE, VERSION_TWO, anatomy_of
from deberta_kernels.models.guards.own_code import runs_own
from deberta_kernels.models.patched_class import Patched
from deberta_kernels.models.registry import homes
from deberta_kernels.torch_state.modes import function_mode
from deberta_kernels.torch_state.onlookers import (
    are_instances_watched,
    calls_differently,
    has_forward_hooks,
    is_watched,
    sees_every_call,
)
from deberta_kernels.torch_state.originals import Originals, is_own
from deberta_kernels.torch_state.tracing import answered_once, traces_questions

__all__ = ["Handover", "handover_of", "is_known_convolution"]

_LAYERS = ("DebertaV2Layer", "DebertaLayer")
_ATTENTIONS = ("DebertaV2Attention", "DebertaAttention")
_ROUTES = (VERSION_TWO.home, VERSION_ONE.home)
# Packages whose modules compute each token from that token alone, and PyTorch's own modules that do.
_TOKENWISE = (
    "transformers.activations", "transformers.pytorch_utils",
    "transformers.integrations.", "peft.tuners.", f"{PACKAGE}.", "bitsandbytes.", "torchao.",
)  # fmt: skip
_TOKENWISE_TORCH = (
    "Linear", "LayerNorm", "RMSNorm", "Dropout", "Identity", "GELU", "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU",
    "SELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Softplus", "Hardtanh", "Hardswish", "Embedding", "Sequential",
    "ModuleList", "ModuleDict", "ParameterList", "ParameterDict", "ParametrizationList",
)  # fmt: skip
_TOKENWISE_FUNCTIONS = ("relu", "silu", "mish", "elu", "selu", "leaky_relu", "hardswish", "tanh", "sigmoid")
_FSDP = "torch.distributed.fsdp"
# Parameters of these types, and of others of these packages, show nobody what they are multiplied by.
_WEIGHTS = (nn.Parameter, type(None), Tensor)
_TENSORS = ("torch.", "torchao.", "bitsandbytes.")
# What the modules around the attention call, which would see packed states: place, name and home as `is_own` knows it.
_FUNCTIONS = Originals(
    *((nn.functional, name, "torch.nn.functional", name) for name in ("layer_norm", "dropout")),
    *((nn.functional, name, "torch._C._nn", name) for name in ("linear", "gelu")),
    (nn.modules.normalization, "F", "torch.nn.functional", ""),
    (nn.modules.linear, "F", "torch.nn.functional", ""),
    (nn.modules.dropout, "F", "torch.nn.functional", ""),
)
# The parts that a class calls by these names must be modules, which are looked at.
_PARTS = {
    "DisentangledSelfAttention": {"dropout"},
    "Layer": {"attention", "intermediate", "output"},
    "Attention": {"self", "output"},
    "Intermediate": {"dense"},
    "Output": {"dense", "LayerNorm", "dropout"},
}


class Handover(IntEnum):
    """What a layer is given; each step asks for more than the one before."""

    TENSORS = 0  # what Hugging Face hands over: padded states, its mask and its distances
    MASK = 1  # the mask object instead of mask and distances
    PACKED = 2  # packed states too; and no code but the known runs inside


def handover_of(
    layer: nn.Module, encoder: Any, takes_mask: Callable[[nn.Module, set[Any]], bool], adapted: bool, seen: set[Any]
) -> Handover:
    """Return what an encoder may hand to one of its layers now.

    Args:
        layer: any module.
        encoder: `DebertaV2Encoder`, or `DebertaEncoder` of DeBERTa v1.
        takes_mask: whether an attention module is fused and would compute a call; it gets `seen` too.
        adapted: the attention modules take a mask type of their own, and their states are never packed.
        seen: classes, and questions about all modules, that need no second look; the caller empties it whenever code
            may have run that can change them. What belongs to one module is looked at every time.
    """
    if traces_questions():
        return _as_traced(layer, takes_mask, seen)
    return _decide(layer, encoder, takes_mask, adapted, seen)


def _as_traced(layer: Any, takes_mask: Callable[[nn.Module, set[Any]], bool], seen: set[Any]) -> Handover:
    """Decide by what an older tracer can follow: hooks, and whether the attention is fused."""
    if "attention" not in layer._modules or "self" not in layer.attention._modules:
        return Handover.TENSORS
    parts = (layer, layer.attention, layer.attention.self)
    if any(map(has_forward_hooks, parts)) or not takes_mask(parts[-1], seen):
        return Handover.TENSORS
    return Handover.MASK


@answered_once
def _decide(
    layer: nn.Module, encoder: Any, takes_mask: Callable[[nn.Module, set[Any]], bool], adapted: bool, seen: set[Any]
) -> Handover:
    if sees_every_call not in seen:
        if sees_every_call() is not None:
            return Handover.TENSORS
        seen.add(sees_every_call)
    attention: Any = layer._modules.get("attention")
    inner: Any = None if attention is None else attention._modules.get("self")
    route = type(layer), type(attention)
    if inner is None or (route not in seen and not _are_route(*route)):
        return Handover.TENSORS
    seen.add(route)
    if layer.training and getattr(layer, "gradient_checkpointing", False) and _has_own_checkpoint(layer):
        return Handover.TENSORS
    tokenwise = not adapted and _is_tokenwise(layer, seen)
    if not tokenwise and any(map(is_watched, (layer, attention, inner))):
        return Handover.TENSORS
    if not takes_mask(inner, seen) or not anatomy_of(inner).agrees(encoder, inner):
        return Handover.TENSORS
    if not tokenwise:
        return Handover.MASK
    if _FUNCTIONS not in seen:
        if _FUNCTIONS.replaced() is not None or function_mode():
            return Handover.MASK
        seen.add(_FUNCTIONS)
    return Handover.PACKED


def _are_route(*route: type[nn.Module]) -> bool:
    """Tell whether the classes of a layer and its attention are those that do no more with a mask than hand it on."""
    for cls, names in zip(route, (_LAYERS, _ATTENTIONS)):
        if not any(c.__name__ in names and c.__module__ in _ROUTES for c in cls.__mro__) or not runs_own(cls, _ROUTES):
            return False
    return True


def _has_own_checkpoint(layer: Any) -> bool:
    """Tell whether something else than PyTorch's checkpoint runs a layer with checkpoints again in the backward."""
    function = layer._gradient_checkpointing_func
    while isinstance(function, functools.partial):  # the options of the checkpoint
        function = function.func
    return not is_own(inspect.unwrap(function), "torch.utils.checkpoint", "checkpoint")


def is_known_convolution(module: nn.Module) -> bool:
    """Tell whether an encoder's convolution runs its own code and nobody looks on: padded rows are zero after it."""
    return traces_questions() or _is_known_convolution(module)


@answered_once
def _is_known_convolution(module: nn.Module) -> bool:
    if not any(c.__name__ == "ConvLayer" and c.__module__ == VERSION_TWO.home for c in type(module).__mro__):
        return False
    prefixes = (VERSION_TWO.home, "torch.nn.")
    return all(not is_watched(part) and runs_own(type(part), prefixes) for part in module.modules())


def _is_tokenwise(layer: nn.Module, seen: set[Any]) -> bool:
    """Tell whether nobody looks on in a layer, and nothing could notice (1, rows, C) in place of (B, N, C)."""
    parts: list[Any] = [layer]
    for part in parts:  # which grows
        if part is None:
            continue
        cls: Any = type(part)
        own = part.__dict__
        if cls not in seen:
            if calls_differently(cls) or not _computes_each_token(cls):
                return False
            seen.add(cls)
        for parameter in own["_parameters"].values():
            kind = type(parameter)
            if kind not in _WEIGHTS and not kind.__module__.startswith(_TENSORS):
                return False  # whose own __torch_function__ sees every product
        if modules := own["_modules"]:
            if not _parts_of(cls).issubset(modules):
                return False
            if "intermediate_act_fn" in own and not _is_tokenwise_function(own["intermediate_act_fn"]):  # no module
                return False
            parts += modules.values()
        elif "normalized_shape" in own and len(own["normalized_shape"]) != 1:
            return False  # a norm over tokens
    return not are_instances_watched(parts)


@functools.cache
def _parts_of(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of what a module of Hugging Face's classes must have as modules."""
    is_theirs = cls.__module__.startswith("transformers.models.")
    found = next((found for name, found in _PARTS.items() if is_theirs and cls.__name__.endswith(name)), ())
    return frozenset(found)


def _computes_each_token(cls: type[nn.Module]) -> bool:
    base: type[nn.Module] = getattr(cls, "patched_from", cls)
    own = base
    if own.__module__.startswith(_FSDP):  # FSDP2 puts a class of its own in front that adds only hooks
        own = next(c for c in base.__mro__ if not c.__module__.startswith(_FSDP))
    if own.__module__.startswith("torch.nn.") and own.__name__ in _TOKENWISE_TORCH:
        return runs_own(base, ("torch.nn.",))
    if own.__name__.startswith("Parametrized"):  # torch.nn.utils.parametrize makes a subclass for each module
        return own.__module__ == "torch.nn.utils.parametrize" and _computes_each_token(own.__bases__[0])
    prefixes = _tokenwise()
    return (own.__module__.startswith(prefixes) or issubclass(cls, Patched)) and runs_own(base, prefixes)


@functools.cache
def _tokenwise() -> tuple[str, ...]:
    return (*homes(), *_TOKENWISE)


def _is_tokenwise_function(function: Any) -> bool:
    if is_own(function, "torch._C._nn", "gelu"):
        return True
    return any(is_own(function, "torch.nn.functional", name) for name in _TOKENWISE_FUNCTIONS)
