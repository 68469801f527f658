"""Know Hugging Face's DeBERTa-v2 classes: which modules may be fused, and the forwards that stand in for theirs.

Transformers 4.57 and 5.x differ in nothing that matters here. A module is fused only if the code it would run is
exactly theirs; subclasses with a forward of their own (AdapterHub's attention among them), other packages' classes of
the same name, and DeBERTa v1 are left alone, each for a reason that is reported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import dispatch
from deberta_kernels.integrations.encoder import encode
from deberta_kernels.integrations.swap import ORIGINAL, Swapped, base_class, forward_of, original_forward
from deberta_kernels.modules.linear import apply_linear, apply_linear_gelu
from deberta_kernels.modules.self_attention import AttentionOptions, DisentangledSelfAttention, attend

__all__ = ["FusedAttention", "FusedEncoder", "dense_blocks", "install", "plan", "uninstall"]

_MODELING = "transformers.models.deberta_v2.modeling_deberta_v2"
_ATTENTION, _ENCODER = "DisentangledSelfAttention", "DebertaV2Encoder"
_UNFUSED = "an attention module of this encoder is not Hugging Face's own"
_UNFUSED_REMEDY = "models with AdapterHub's or other custom attention are not fused in this release"


class FusedAttention(Swapped):
    """Mix the kernels into one attention module of a patched model."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `attend` for the arguments."""
        return attend(
            self, self.swap_options, self.swap_original, hidden_states, attention_mask, output_attentions,
            query_states, relative_pos, rel_embeddings,
        )  # fmt: skip


class FusedEncoder(Swapped):
    """Mix the encoder without N x N tensors into the encoder of a patched model."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = True,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Run all layers; see `encode` for the arguments."""
        return _encode_if_fused(
            self, self.swap_options, self.swap_original, hidden_states, attention_mask, output_hidden_states,
            output_attentions, query_states, relative_pos, return_dict,
        )  # fmt: skip


class FusedIntermediate(Swapped):
    """Mix oneDNN's linear layer and GELU into the first half of a feed-forward block."""

    dense: nn.Linear
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Widen (..., hidden size) to (..., intermediate size)."""
        return apply_linear_gelu(self.dense, self.intermediate_act_fn, hidden_states)


class FusedOutput(Swapped):
    """Mix oneDNN's linear layer into what follows attention, or ends a feed-forward block."""

    dense: nn.Linear
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Project hidden_states and add them to input_tensor, both (..., hidden size) when done."""
        normalised: Tensor = self.LayerNorm(self.dropout(apply_linear(self.dense, hidden_states)) + input_tensor)
        return normalised


# The options of the classes whose forwards `install` replaced; read at every call, so that new ones hold at once.
_installed = AttentionOptions()


@functools.wraps(FusedAttention.forward)
def _attention_forward(self: nn.Module, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
    """Stand in for the forward of Hugging Face's attention class."""
    return attend(self, _installed, getattr(_attention_forward, ORIGINAL), *arguments, **named)


@functools.wraps(FusedEncoder.forward)
def _encoder_forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
    """Stand in for the forward of Hugging Face's encoder class."""
    return _encode_if_fused(self, _installed, getattr(_encoder_forward, ORIGINAL), *arguments, **named)


@functools.wraps(FusedIntermediate.forward)
def _intermediate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Stand in for the forward of Hugging Face's class for the first half of a feed-forward block."""
    return FusedIntermediate.forward(self, hidden_states)


@functools.wraps(FusedOutput.forward)
def _output_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """Stand in for the forward of Hugging Face's class for the second half of a feed-forward block."""
    return FusedOutput.forward(self, hidden_states, input_tensor)


@functools.wraps(FusedOutput.forward)
def _self_output_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """Stand in for the forward of Hugging Face's class for what follows attention."""
    return FusedOutput.forward(self, hidden_states, input_tensor)


_FUSED: dict[str, Callable[..., Any]] = {_ATTENTION: _attention_forward, _ENCODER: _encoder_forward}
_DENSE: dict[str, Callable[..., Any]] = {
    "DebertaV2Intermediate": _intermediate_forward,
    "DebertaV2Output": _output_forward,
    "DebertaV2SelfOutput": _self_output_forward,
}


def _encode_if_fused(module: Any, options: AttentionOptions, original: Any, *arguments: Any, **named: Any) -> Any:
    """Run the encoder without N x N tensors, unless one of its attention modules would not understand that.

    Attention modules may have been given another class since patching, as `adapters.init` does.
    """
    if all(_is_fused(layer.attention.self) for layer in module.layer):
        return encode(module, options, original, *arguments, **named)
    if torch.compiler.is_compiling():
        return original(module, *arguments, **named)
    dispatch.fallback(_UNFUSED, _UNFUSED_REMEDY, options.strict)
    return original(module, *arguments, **named)


def _is_fused(attention: nn.Module) -> bool:
    forward = forward_of(attention)
    return forward in (FusedAttention.forward, _attention_forward, DisentangledSelfAttention.forward)


def install(options: AttentionOptions) -> None:
    """Put the fused forwards in place of those of Hugging Face's classes; again: only change the options.

    Raises:
        ImportError: transformers does not import.
        NotImplementedError: the forwards in this transformers are not the ones this package knows.
    """
    global _installed
    try:
        hf: Any = importlib.import_module(_MODELING)
    except ImportError as error:
        raise ImportError(
            f"patch_all() needs the package transformers, which does not import ({error}); "
            'pip install "deberta_kernels[transformers]".'
        ) from error
    for name, stand_in in _FUSED.items():
        reason = _unknown_code(getattr(hf, name), stand_in)
        if reason is not None:
            raise NotImplementedError(f"patch_all() cannot patch {name}: {reason}.")
    uninstall()
    _installed = options
    for name, stand_in in {**_FUSED, **(_DENSE if options.onednn else {})}.items():
        cls = getattr(hf, name)
        if _unknown_code(cls, stand_in) is None:
            setattr(stand_in, ORIGINAL, cls.forward)
            cls.forward = stand_in


def uninstall() -> bool:
    """Put the classes' own forwards back; return whether they had been replaced."""
    hf: Any = _modeling()
    replaced = [
        cls
        for name, stand_in in {**_FUSED, **_DENSE}.items()
        if (cls := getattr(hf, name, None)) and cls.forward is stand_in
    ]
    for cls in replaced:
        cls.forward = original_forward(cls)
    return bool(replaced)


def dense_blocks(encoder: nn.Module) -> Iterator[tuple[nn.Module, type[Swapped]]]:
    """Yield the modules around the attention of an encoder whose linear layers may run in oneDNN, and their mixins."""
    for layer in getattr(encoder, "layer", ()):
        for module, mixin in (
            (layer.attention.output, FusedOutput), (layer.intermediate, FusedIntermediate), (layer.output, FusedOutput),
        ):  # fmt: skip
            name = base_class(module).__name__
            if name in _DENSE and _reason(module, name, _DENSE[name], ()) is None:
                yield module, mixin


def plan(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module], dict[str, str]]:
    """Find what can be fused in a model, and say why the rest cannot.

    Args:
        model: any module; the transformers package is not imported for it.

    Returns:
        (encoders, attention modules, name of each DeBERTa module left alone -> reason).
    """
    left_alone: dict[str, str] = {}
    encoders: list[nn.Module] = []
    inside: dict[nn.Module, str | None] = {}
    for name, encoder in _named(model, _ENCODER):
        names = {f"{name}.layer.{i}.attention.self".lstrip("."): m for i, m in enumerate(_attention_of(encoder))}
        reasons = {key: _attention_reason(module) for key, module in names.items()}
        own = _reason(encoder, _ENCODER, _encoder_forward, ("get_attention_mask", "get_rel_pos"))
        shared = own or next((f"beside {key}: {reason}" for key, reason in reasons.items() if reason), None)
        if shared is None:
            encoders.append(encoder)
        else:
            left_alone[name] = shared
        inside.update({module: reasons[key] or shared for key, module in names.items()})
    attentions: list[nn.Module] = []
    for name, attention in _named(model, _ATTENTION):
        reason = inside[attention] if attention in inside else _attention_reason(attention)
        if reason is None:
            attentions.append(attention)
        else:
            left_alone[name] = reason
    return encoders, attentions, left_alone


def _named(model: nn.Module, class_name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules one of whose classes has this name: Hugging Face's, subclasses, and others called alike."""
    for name, module in model.named_modules():
        classes = type(module).__mro__
        if any(c.__name__ == class_name and not c.__module__.startswith("deberta_kernels") for c in classes):
            yield name, module


def _attention_of(encoder: nn.Module) -> list[nn.Module]:
    layers = getattr(encoder, "layer", ())
    found = (getattr(getattr(layer, "attention", None), "self", None) for layer in layers)
    return [module for module in found if isinstance(module, nn.Module)]


def _attention_reason(module: nn.Module) -> str | None:
    if isinstance(module, DisentangledSelfAttention):
        return None
    return _reason(module, _ATTENTION, _attention_forward, ("disentangled_attention_bias", "transpose_for_scores"))


def _reason(module: nn.Module, class_name: str, stand_in: Callable[..., Any], methods: tuple[str, ...]) -> str | None:
    """Return why a module must be left alone; None if it runs exactly Hugging Face's code."""
    cls = base_class(module)
    hf = _modeling()
    known = getattr(hf, class_name, None)
    if known is None or not issubclass(cls, known):
        if any(c.__module__ == "transformers.models.deberta.modeling_deberta" for c in cls.__mro__):
            return "DeBERTa v1 computes another attention under the same class name"
        return f"{cls.__module__}.{cls.__qualname__} is not transformers' DeBERTa-v2"
    unknown = _unknown_code(known, stand_in)
    if unknown is not None:
        return unknown
    if original_forward(cls) is not original_forward(known):
        if cls.__module__.startswith("adapters."):
            return "AdapterHub's attention has a forward of its own (prefixes, LoRA); not fused in this release"
        return f"{cls.__module__}.{cls.__qualname__} has a forward of its own"
    changed = next((name for name in methods if getattr(cls, name, None) is not getattr(known, name, None)), None)
    if changed is not None:
        return f"{cls.__module__}.{cls.__qualname__} has its own {changed}"
    hidden = next((name for name in methods if name in module.__dict__), None)
    if hidden is not None or forward_of(module) is None:
        return f"its {hidden or 'forward'} was replaced on the instance"
    return None


def _unknown_code(cls: type[nn.Module], stand_in: Callable[..., Any]) -> str | None:
    """Return why the class's forward is not one that `stand_in` can replace; None if it is."""
    forward = original_forward(cls)
    if forward.__module__ != _MODELING:
        return f"the forward of {cls.__name__} was replaced by {forward.__module__}.{forward.__qualname__}"
    found = list(inspect.signature(forward).parameters)
    if found != list(inspect.signature(stand_in).parameters):
        return f"the forward of {cls.__name__} in this transformers takes {found}, which this release does not know"
    return None


def _modeling() -> ModuleType | None:
    """Return Hugging Face's modeling module; None unless somebody imported it, since no model needs it then."""
    return sys.modules.get(_MODELING)
