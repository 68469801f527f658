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
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import dispatch
from deberta_kernels.models.adapterhub import attend_with_adapters
from deberta_kernels.models.anatomy import TALKING_HEADS, mixes_heads
from deberta_kernels.models.attention import attend
from deberta_kernels.models.dense import KNOWN_DENSE, fuse_dense, stand_in
from deberta_kernels.models.encoder import encode
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.guards.allow_list import refusal_everywhere, refusal_of
from deberta_kernels.models.guards.known import (
    ADAPTERHUB,
    ADAPTERHUB_ONE,
    MODELING,
    MODELING_ONE,
    Known,
    replaced_function,
)
from deberta_kernels.models.guards.running import begin, end, paused
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.standalone.self_attention import DisentangledSelfAttention
from deberta_kernels.models.swap import ORIGINAL, Swapped, base_class, forward_of, original_forward, swap
from deberta_kernels.torch_state.tracing import answered_once, traces_questions

__all__ = ["FusedAttention", "FusedEncoder", "attention_mixin", "install", "plan", "uninstall"]

_ATTENTION, _ENCODER, _ENCODER_ONE = "DisentangledSelfAttention", "DebertaV2Encoder", "DebertaEncoder"
_REMEDY = "only the code of transformers and AdapterHub is fused"


class FusedAttention(Swapped):
    """The kernels, to be mixed into one attention module of a patched model."""

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
        return _attend(
            self, hidden_states, attention_mask, output_attentions,
            query_states=query_states, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
        )  # fmt: skip


class FusedAdapterAttention(FusedAttention):
    """The kernels, to be mixed into one attention module that AdapterHub made its own.

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
        return _attend(
            self, hidden_states, attention_mask, output_attentions, compute=attend_with_adapters,
            query_states=query_states, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
        )  # fmt: skip


class FusedEncoder(Swapped):
    """The encoder without N x N tensors, to be mixed into the encoder of a patched model."""

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
        return _encode(
            self, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip


# The options of the classes whose forwards `install` replaced, read at every call, so that new ones hold at once; None
# while none is. accelerate's hooks may hold a stand-in for longer, which then only calls what it stood for.
_installed: AttentionOptions | None = None


def _attention_stand_in(compute: Any = None) -> Any:
    """Return a function to stand in for the forward of an attention class; `compute` as in `attend`."""

    @functools.wraps(FusedAttention.forward)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        original = getattr(forward, ORIGINAL)
        if _installed is None and not isinstance(self, Swapped):
            return original(self, *arguments, **named)  # type: ignore[no-any-return]
        return _attend(self, *arguments, compute=compute, original=original, **named)

    return forward


def _encoder_stand_in() -> Any:
    """Return a function to stand in for the forward of an encoder class."""

    @functools.wraps(FusedEncoder.forward)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        original = getattr(forward, ORIGINAL)
        if _installed is None and not isinstance(self, Swapped):
            return original(self, *arguments, **named)
        return _encode(self, *arguments, original=original, **named)

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
_METHODS = {"forward", *(name for known in _ATTENTIONS for name in known.methods)}
_ADAPTED_FORWARDS = (FusedAdapterAttention.forward, *(known.stand_in for known in _KNOWN_ADAPTED))
_FUSED_FORWARDS = (
    FusedAttention.forward,
    _KNOWN_ATTENTION.stand_in,
    _KNOWN_ATTENTION_ONE.stand_in,
    DisentangledSelfAttention.forward,
    *_ADAPTED_FORWARDS,
)


def _attend(
    module: Any, *arguments: Any, compute: Any = None, original: Any = None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend with the options of the module, unless somebody changed the code that it stands for.

    Args:
        module: the attention module.
        arguments: as of `attend`.
        compute: as in `attend`.
        original: what is stood for; None for the forward of the module's class from before.
        named: as of `attend`.
    """
    mask = arguments[1] if len(arguments) > 1 else named.get("attention_mask")
    # Who gets the encoder's own mask has been looked at by the encoder, just before.
    changed = None if isinstance(mask, EncoderMask) else _changed_attention(module, original is None)
    original, options = original or original_forward(type(module)), _options_of(module)
    if changed is None:
        return attend(module, options, original, *arguments, compute=compute, **named)
    _note(changed, options)
    return original(module, *arguments, **named)  # type: ignore[no-any-return]


def _encode(module: Any, *arguments: Any, original: Any = None, **named: Any) -> Any:
    """Run the encoder as `_attend` does its module; arguments as of `encode`."""
    changed = _changed_encoder(module, original is None)
    original, options = original or original_forward(type(module)), _options_of(module)
    if changed is not None:
        _note(changed, options)
        return original(module, *arguments, **named)
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not begin(module):
        return original(module, *arguments, **named)
    try:
        attentions = _attention_of(module)
        if not is_compiling:
            _fuse_again(module, options, attentions)
        adapted = any(forward_of(attention) in _ADAPTED_FORWARDS for attention in attentions)
        return encode(module, options, original, *arguments, takes_mask=_takes_mask, adapted=adapted, **named)
    finally:
        if not is_compiling:
            end(module)


def _options_of(module: nn.Module) -> AttentionOptions:
    options: AttentionOptions = getattr(module, "swap_options", None) or _installed or AttentionOptions()
    return options


def _note(changed: str, options: AttentionOptions) -> None:
    if not torch.compiler.is_compiling():
        dispatch.fallback(changed, _REMEDY, options.strict)
    elif options.strict:
        raise NotImplementedError(f"{changed}; {_REMEDY}.")


def _changed_attention(module: nn.Module, forward: bool = True) -> str | None:
    """Return which code of an attention module, or code it calls, is not its own any more; None if all is."""
    if _is_ours(module) or traces_questions():
        return None
    return _look_at(module, _ATTENTIONS, forward)


def _changed_encoder(module: nn.Module, forward: bool = True) -> str | None:
    return None if traces_questions() else _look_at(module, _ENCODERS, forward)


@answered_once
def _look_at(module: nn.Module, candidates: tuple[Known, ...], forward: bool) -> str | None:
    known = _known_of(module, *candidates)
    changed = known.changed(module, forward)
    return changed or (replaced_function(known.home) if candidates is _ATTENTIONS else None)


def _takes_mask(attention: nn.Module, seen: set[Any]) -> bool:
    """Tell whether an attention module is fused and computes what its encoder asks for; `seen` as in `handover_of`."""
    if traces_questions():
        return forward_of(attention) in _FUSED_FORWARDS and refusal_of(attention) is None
    own, cls = attention.__dict__, type(attention)
    if (_takes_mask, cls) not in seen or not own.keys().isdisjoint(_METHODS):
        if forward_of(attention) not in _FUSED_FORWARDS or _changed_attention(attention) is not None:
            return False
        if refusal_everywhere() is not None:
            return False
        seen.add((_takes_mask, cls))
    return refusal_of(attention) is None


def _fuse_again(encoder: nn.Module, options: AttentionOptions, attentions: list[nn.Module]) -> None:
    """Fuse the attention modules, and all around them, that AdapterHub has made its own since the patch."""
    for attention in attentions:
        if forward_of(attention) in _FUSED_FORWARDS or attention_mixin(attention) is not FusedAdapterAttention:
            continue
        if _attention_reason(attention) is not None:
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
    dense = KNOWN_DENSE if _installed is not None and _installed.fast_linears else ()
    for known in (*_KNOWN_OF_TRANSFORMERS, *_KNOWN_ADAPTED, *dense):
        known.replace_forward()


def uninstall() -> bool:
    """Put the classes' own forwards back; return whether they had been replaced."""
    global _installed
    with paused(None):
        _installed = None
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
    attentions: list[nn.Module] = []
    for name, module in model.named_modules():
        for modules, names, reason_of in (
            (encoders, (_ENCODER, _ENCODER_ONE), _encoder_reason),
            (attentions, (_ATTENTION,), _attention_reason),
        ):
            if not _is_called(module, *names):
                continue
            reason = reason_of(module)
            if reason is None:
                modules.append(module)
            else:
                left_alone[name] = reason
    # Without any attention to serve, an encoder has nothing to gain.
    fused = set(attentions)
    encoders = [one for one in encoders if any(module in fused or _is_ours(module) for module in one.modules())]
    return encoders, attentions, left_alone


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, DisentangledSelfAttention)


def _is_called(module: nn.Module, *class_names: str) -> bool:
    """Tell whether a module has a class of one of these names: Hugging Face's, subclasses, and others called alike."""
    classes = type(module).__mro__
    return any(c.__name__ in class_names and not c.__module__.startswith("deberta_kernels") for c in classes)


def _encoder_reason(module: nn.Module) -> str | None:
    return _known_of(module, *_ENCODERS).refusal(module)


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
    if _is_ours(module):
        return None
    known = _known_of(module, *_ATTENTIONS)
    return known.refusal(module) or (TALKING_HEADS[0] if mixes_heads(module) else None)
