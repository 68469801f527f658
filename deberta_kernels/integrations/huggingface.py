"""Know the DeBERTa classes of Hugging Face and AdapterHub: which may be fused, and the forwards that stand in.

Transformers 4.57 and 5.x differ in nothing that matters here. DeBERTa v1 has classes of its own, with the same forwards
by name; the attention class even shares its name. A module is fused only if the code it would run is exactly theirs;
other subclasses with a forward of their own, other packages' classes of the same name, and attention that mixes heads
are left alone, each for a reason that is reported.

`adapters.init` gives attention modules AdapterHub's class, patched or not. The patched encoder sees that at its next
call and fuses them anew, so that neither the adapters nor the patch are lost, whichever came first.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import dispatch
from deberta_kernels.integrations.adapter_attention import attend_with_adapters
from deberta_kernels.integrations.dense import KNOWN_DENSE, fuse_dense, stand_in
from deberta_kernels.integrations.encoder import encode
from deberta_kernels.integrations.known import ADAPTERHUB, ADAPTERHUB_ONE, MODELING, MODELING_ONE, Known
from deberta_kernels.integrations.swap import ORIGINAL, Swapped, base_class, forward_of, original_forward, swap
from deberta_kernels.modules.anatomy import TALKING_HEADS, mixes_heads
from deberta_kernels.modules.options import AttentionOptions
from deberta_kernels.modules.self_attention import DisentangledSelfAttention, attend

__all__ = ["BESIDE", "FusedAttention", "FusedEncoder", "attention_mixin", "install", "plan", "uninstall"]

_ATTENTION, _ENCODER, _ENCODER_ONE = "DisentangledSelfAttention", "DebertaV2Encoder", "DebertaEncoder"
# Begins the reason of what is left alone only because of another module.
BESIDE = "beside"
_UNFUSED = "an attention module of this encoder is neither Hugging Face's nor AdapterHub's own"
_UNFUSED_REMEDY = "models with custom attention are not fused"
# Where the forwards of layers come from that only hand the mask on.
_ROUTING = ("transformers.", "adapters.", "torch.", "deberta_kernels.")


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


class FusedAdapterAttention(FusedAttention):
    """Mix the kernels into one attention module that AdapterHub made its own.

    Its forward is a function of its own on purpose: the encoder tells adapted modules by it, see `_ADAPTED_FORWARDS`.
    """

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
            query_states, relative_pos, rel_embeddings, compute=attend_with_adapters,
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


# The options of the classes whose forwards `install` replaced; read at every call, so that new ones hold at once.
_installed = AttentionOptions()


def _attention_stand_in(compute: Any = None) -> Any:
    """Return a function to stand in for the forward of an attention class; `compute` as in `attend`."""

    @functools.wraps(FusedAttention.forward)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        original = getattr(forward, ORIGINAL)
        changed = _changed_method(self, _ATTENTIONS)
        if changed is not None:
            dispatch.fallback(changed, _UNFUSED_REMEDY, _installed.strict)
            return original(self, *arguments, **named)  # type: ignore[no-any-return]
        return attend(self, _installed, original, *arguments, compute=compute, **named)

    return forward


def _encoder_stand_in() -> Any:
    """Return a function to stand in for the forward of an encoder class."""

    @functools.wraps(FusedEncoder.forward)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        return _encode_if_fused(self, _installed, getattr(forward, ORIGINAL), *arguments, **named)

    return forward


_MASKS = ("get_attention_mask", "get_rel_pos")
_BIAS = ("disentangled_attention_bias", "transpose_for_scores")
_BIAS_ONE = ("disentangled_att_bias", "transpose_for_scores")
_KNOWN_ATTENTION = Known(MODELING, _ATTENTION, _attention_stand_in(), _BIAS)
_KNOWN_ENCODER = Known(MODELING, _ENCODER, _encoder_stand_in(), _MASKS)
_KNOWN_ATTENTION_ONE = Known(MODELING_ONE, _ATTENTION, _attention_stand_in(), _BIAS_ONE)
_KNOWN_ENCODER_ONE = Known(MODELING_ONE, _ENCODER_ONE, _encoder_stand_in(), _MASKS)
_ADAPTED = f"{_ATTENTION}WithAdapters"
_KNOWN_ADAPTED = (
    Known(ADAPTERHUB, _ADAPTED, _attention_stand_in(attend_with_adapters), (*_BIAS, "transpose_for_scores_extended")),
    Known(ADAPTERHUB_ONE, _ADAPTED, _attention_stand_in(attend_with_adapters), _BIAS_ONE),
)
_ATTENTIONS = (*_KNOWN_ADAPTED, _KNOWN_ATTENTION_ONE, _KNOWN_ATTENTION)
_ENCODERS = (_KNOWN_ENCODER_ONE, _KNOWN_ENCODER)
_KNOWN_OF_TRANSFORMERS = (_KNOWN_ATTENTION, _KNOWN_ENCODER, _KNOWN_ATTENTION_ONE, _KNOWN_ENCODER_ONE)


def _encode_if_fused(module: Any, options: AttentionOptions, original: Any, *arguments: Any, **named: Any) -> Any:
    """Run the encoder without N x N tensors, unless one of its attention modules would not understand that.

    Attention modules may have been given another class since patching, as `adapters.init` does.
    """
    attentions = [layer.attention.self for layer in module.layer]
    if not all(map(_is_fused, attentions)):
        if torch.compiler.is_compiling():
            return original(module, *arguments, **named)
        _fuse_again(module, options, attentions)
        if not all(map(_is_fused, attentions)):
            dispatch.fallback(_UNFUSED, _UNFUSED_REMEDY, options.strict)
            return original(module, *arguments, **named)
    changed = _changed_method(module, _ENCODERS)
    for attention in attentions:
        changed = changed or _changed_method(attention, _ATTENTIONS)
    if changed is not None:
        dispatch.fallback(changed, _UNFUSED_REMEDY, options.strict)
        return original(module, *arguments, **named)
    adapted = any(forward_of(attention) in _ADAPTED_FORWARDS for attention in attentions)
    return encode(module, options, original, *arguments, adapted=adapted, **named)


def _changed_method(module: nn.Module, candidates: tuple[Known, ...]) -> str | None:
    """Return why a call must run the original code: after patching too, and of subclasses that `patch_all` reaches."""
    if torch.compiler.is_compiling() or isinstance(module, DisentangledSelfAttention):
        return None
    return _known_of(module, *candidates).changed_method(module)


_ADAPTED_FORWARDS = (FusedAdapterAttention.forward, *(known.stand_in for known in _KNOWN_ADAPTED))
_FUSED_FORWARDS = (
    FusedAttention.forward,
    _KNOWN_ATTENTION.stand_in,
    _KNOWN_ATTENTION_ONE.stand_in,
    DisentangledSelfAttention.forward,
    *_ADAPTED_FORWARDS,
)


def _is_fused(attention: nn.Module) -> bool:
    return forward_of(attention) in _FUSED_FORWARDS


def _fuse_again(encoder: nn.Module, options: AttentionOptions, attentions: list[nn.Module]) -> None:
    """Fuse the attention modules, and all around them, that AdapterHub has made its own since the patch."""
    for attention in attentions:
        adapted = attention_mixin(attention) is FusedAdapterAttention
        if _is_fused(attention) or not adapted or _attention_reason(attention) is not None:
            continue
        if isinstance(encoder, FusedEncoder):
            swap(attention, FusedAdapterAttention, options)
            fuse_dense(encoder, options)
        else:
            _replace_forwards()


def install(options: AttentionOptions) -> None:
    """Put the fused forwards in place of those of Hugging Face's classes; again: only change the options.

    Raises:
        ImportError: transformers does not import.
        NotImplementedError: the forwards in this transformers are not the ones this package knows.
    """
    global _installed
    try:
        importlib.import_module(MODELING)
        importlib.import_module(MODELING_ONE)
    except ImportError as error:
        raise ImportError(
            f"patch_all() needs the package transformers, which does not import ({error}); "
            'pip install "deberta_kernels[transformers]".'
        ) from error
    for known in _KNOWN_OF_TRANSFORMERS:
        reason = known.unknown_code()
        if reason is not None:
            raise NotImplementedError(f"patch_all() cannot patch {known.name}: {reason}.")
    uninstall()
    _installed = options
    stand_in(options)
    _replace_forwards()


def _replace_forwards() -> None:
    for known in (*_KNOWN_OF_TRANSFORMERS, *_KNOWN_ADAPTED, *(KNOWN_DENSE if _installed.fast_linears else ())):
        known.replace_forward()


def uninstall() -> bool:
    """Put the classes' own forwards back; return whether they had been replaced."""
    restored = [known.restore_forward() for known in (*_KNOWN_OF_TRANSFORMERS, *_KNOWN_ADAPTED, *KNOWN_DENSE)]
    return any(restored)


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
    for name, encoder in _named(model, _ENCODER, _ENCODER_ONE):
        names = {f"{name}.layer.{i}.attention.self".lstrip("."): m for i, m in enumerate(_attention_of(encoder))}
        reasons = {key: _attention_reason(module) for key, module in names.items()}
        own = _known_of(encoder, *_ENCODERS).refusal(encoder) or _layer_reason(encoder)
        shared = own or next((f"{BESIDE} {key}: {reason}" for key, reason in reasons.items() if reason), None)
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


def _layer_reason(encoder: nn.Module) -> str | None:
    """Return which layer, or attention around the fused one, might look at the mask, which is no tensor there."""
    for layer in getattr(encoder, "layer", ()):
        for part in (layer, getattr(layer, "attention", layer)):
            cls = base_class(part)
            if not original_forward(cls).__module__.startswith(_ROUTING):
                return f"{cls.__module__}.{cls.__qualname__} has a forward of its own"
    return None


def _named(model: nn.Module, *class_names: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with a class of one of these names: Hugging Face's, subclasses, and others called alike."""
    for name, module in model.named_modules():
        classes = type(module).__mro__
        if any(c.__name__ in class_names and not c.__module__.startswith("deberta_kernels") for c in classes):
            yield name, module


def _attention_of(encoder: nn.Module) -> list[nn.Module]:
    layers = getattr(encoder, "layer", ())
    found = (getattr(getattr(layer, "attention", None), "self", None) for layer in layers)
    return [module for module in found if isinstance(module, nn.Module)]


def _known_of(module: nn.Module, *candidates: Known) -> Known:
    """Return the class that a module is an instance of; the last candidate if it is of none."""
    for known in candidates:
        cls = known.find()
        if cls is not None and issubclass(base_class(module), cls):
            return known
    return candidates[-1]


def attention_mixin(module: nn.Module) -> type[FusedAttention]:
    """Return what to mix into an attention module: what its class computes decides."""
    known = _known_of(module, *_KNOWN_ADAPTED, _KNOWN_ATTENTION)
    return FusedAdapterAttention if known in _KNOWN_ADAPTED else FusedAttention


def _attention_reason(module: nn.Module) -> str | None:
    if isinstance(module, DisentangledSelfAttention):
        return None
    known = _known_of(module, *_ATTENTIONS)
    return known.refusal(module) or (TALKING_HEADS[0] if mixes_heads(module) else None)
