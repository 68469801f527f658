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
from deberta_kernels.modules.self_attention import AttentionOptions, DisentangledSelfAttention, attend

__all__ = ["FusedAttention", "FusedEncoder", "install", "plan", "uninstall"]

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


# What `install` put in place of the classes' forwards; read at every call, so that new options hold at once.
_installed = AttentionOptions()
_attention_original: Callable[..., Any] | None = None
_encoder_original: Callable[..., Any] | None = None


@functools.wraps(FusedAttention.forward)
def _attention_forward(self: nn.Module, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
    """Stand in for the forward of Hugging Face's attention class."""
    return attend(self, _installed, _attention_original, *arguments, **named)


@functools.wraps(FusedEncoder.forward)
def _encoder_forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
    """Stand in for the forward of Hugging Face's encoder class."""
    return _encode_if_fused(self, _installed, _encoder_original, *arguments, **named)


# What the forwards that are replaced must take: what their stand-ins take.
_ATTENTION_ARGUMENTS = list(inspect.signature(FusedAttention.forward).parameters)
_ENCODER_ARGUMENTS = list(inspect.signature(FusedEncoder.forward).parameters)


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
    global _installed, _attention_original, _encoder_original
    try:
        hf: Any = importlib.import_module(_MODELING)
    except ImportError as error:
        raise ImportError(
            f"patch_all() needs the package transformers, which does not import ({error}); "
            'pip install "deberta_kernels[transformers]".'
        ) from error
    for name, arguments in ((_ATTENTION, _ATTENTION_ARGUMENTS), (_ENCODER, _ENCODER_ARGUMENTS)):
        cls = getattr(hf, name)
        reason = _unknown_code(cls, arguments)
        if reason is not None:
            raise NotImplementedError(f"patch_all() cannot patch {name}: {reason}.")
    _installed = options
    _attention_original = original_forward(hf.DisentangledSelfAttention)
    _encoder_original = original_forward(hf.DebertaV2Encoder)
    setattr(_attention_forward, ORIGINAL, _attention_original)
    setattr(_encoder_forward, ORIGINAL, _encoder_original)
    hf.DisentangledSelfAttention.forward = _attention_forward
    hf.DebertaV2Encoder.forward = _encoder_forward


def uninstall() -> bool:
    """Put the classes' own forwards back; return whether they had been replaced."""
    hf: Any = _modeling()
    classes = () if hf is None else (hf.DisentangledSelfAttention, hf.DebertaV2Encoder)
    replaced = [cls for cls in classes if cls.forward in (_attention_forward, _encoder_forward)]
    for cls in replaced:
        cls.forward = original_forward(cls)
    return bool(replaced)


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
        own = _reason(encoder, _ENCODER, _ENCODER_ARGUMENTS, ("get_attention_mask", "get_rel_pos"))
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
    return _reason(module, _ATTENTION, _ATTENTION_ARGUMENTS, ("disentangled_attention_bias", "transpose_for_scores"))


def _reason(module: nn.Module, class_name: str, arguments: list[str], methods: tuple[str, ...]) -> str | None:
    """Return why a module must be left alone; None if it runs exactly Hugging Face's code."""
    cls = base_class(module)
    hf = _modeling()
    known = getattr(hf, class_name, None)
    if known is None or not issubclass(cls, known):
        if any(c.__module__ == "transformers.models.deberta.modeling_deberta" for c in cls.__mro__):
            return "DeBERTa v1 computes another attention under the same class name"
        return f"{cls.__module__}.{cls.__qualname__} is not transformers' DeBERTa-v2"
    unknown = _unknown_code(known, arguments)
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


def _unknown_code(cls: type[nn.Module], arguments: list[str]) -> str | None:
    """Return why the class's forward is not one this package knows; None if it is."""
    forward = original_forward(cls)
    if forward.__module__ != _MODELING:
        return f"the forward of {cls.__name__} was replaced by {forward.__module__}.{forward.__qualname__}"
    found = list(inspect.signature(forward).parameters)
    if found != arguments:
        return f"the forward of {cls.__name__} in this transformers takes {found}, which this release does not know"
    return None


def _modeling() -> ModuleType | None:
    """Return Hugging Face's modeling module; None unless somebody imported it, since no model needs it then."""
    return sys.modules.get(_MODELING)
