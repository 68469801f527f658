"""What runs in place of attention modules and encoders: the fused forwards, unless somebody changed what they replace.

`patch` mixes them into one module, see `patched_class`. `patch_all` replaces forwards of classes, see `registry`, so
that models keep their classes. Both end in the same functions, with the options of the module or those for all. What
they cannot share is where the original forward is found: below a mixin it is that of the module's class; a replaced
forward has to remember it, since a subclass with a forward of its own may call it as its parent's.

`adapters.init` gives attention modules AdapterHub's class, patched or not. The patched encoder sees that at its next
call and fuses them anew, so that neither the adapters nor the patch are lost, whichever came first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import notices
from deberta_kernels.models.anatomy import TALKING_HEADS, VERSION_ONE, VERSION_TWO, mixes_heads
from deberta_kernels.models.attention import attend, attend_fused
from deberta_kernels.models.dense import fuse_dense
from deberta_kernels.models.encoder import encode
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.guards.allow_list import refusal_everywhere, refusal_of
from deberta_kernels.models.guards.own_code import replaced_function
from deberta_kernels.models.guards.running import begin, end
from deberta_kernels.models.options import AttentionOptions, options_of
from deberta_kernels.models.patched_class import Patched, original_forward, patch_class
from deberta_kernels.models.registry import (
    REMEDY,
    Kind,
    ModuleClass,
    attention_methods,
    fused_row,
    register,
    register_forward,
    replace_forwards,
    row_of,
)
from deberta_kernels.models.standalone.self_attention import DisentangledSelfAttention
from deberta_kernels.torch_state.tracing import answered_once, traces_questions

__all__ = [
    "FusedAttention",
    "FusedEncoder",
    "attend_unless_changed",
    "attention_of",
    "attention_refusal",
    "encode_unless_changed",
    "is_ours",
]


class FusedAttention(Patched):
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
        return attend_unless_changed(
            self, hidden_states, attention_mask, output_attentions,
            query_states=query_states, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
        )  # fmt: skip


class FusedEncoder(Patched):
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
        return encode_unless_changed(
            self, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip


def attend_unless_changed(
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
    if isinstance(mask, EncoderMask):  # who gets that has been looked at by the encoder, just before
        return attend_fused(module, options_of(module), *arguments, compute=compute, **named)
    changed = _changed_attention(module, original is None)
    original, options = original or original_forward(type(module)), options_of(module)
    if changed is None:
        return attend(module, options, original, *arguments, compute=compute, **named)
    _note(changed, options)
    return original(module, *arguments, **named)  # type: ignore[no-any-return]


def encode_unless_changed(module: Any, *arguments: Any, original: Any = None, **named: Any) -> Any:
    """Run the encoder as `attend_unless_changed` does its module; arguments as of `encode`."""
    changed = None if traces_questions() else _look_at(module, Kind.ENCODER, original is None)
    original, options = original or original_forward(type(module)), options_of(module)
    if changed is not None:
        _note(changed, options)
        return original(module, *arguments, **named)
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not begin(module):
        return original(module, *arguments, **named)
    try:
        found = list(map(fused_row, attention_of(module)))
        if not is_compiling and None in found:
            _fuse_again(module, options)
            found = list(map(fused_row, attention_of(module)))
        mask_types = [row.mask_type for row in found if row is not None and row.mask_type is not EncoderMask]
        mask_type = mask_types[0] if mask_types else EncoderMask
        return encode(module, options, original, *arguments, takes_mask=_takes_mask, mask_type=mask_type, **named)
    finally:
        if not is_compiling:
            end(module)


_BIAS = ("disentangled_attention_bias", "transpose_for_scores")
_BIAS_ONE = ("disentangled_att_bias", "transpose_for_scores")
_MASKS = ("get_attention_mask", "get_rel_pos")
_ATTENTION = "DisentangledSelfAttention"
register(
    *(
        ModuleClass(kind, version, version.home, name, mixin, run, methods)
        for kind, version, name, mixin, run, methods in (
            (Kind.ATTENTION, VERSION_TWO, _ATTENTION, FusedAttention, attend_unless_changed, _BIAS),
            (Kind.ATTENTION, VERSION_ONE, _ATTENTION, FusedAttention, attend_unless_changed, _BIAS_ONE),
            (Kind.ENCODER, VERSION_TWO, "DebertaV2Encoder", FusedEncoder, encode_unless_changed, _MASKS),
            (Kind.ENCODER, VERSION_ONE, "DebertaEncoder", FusedEncoder, encode_unless_changed, _MASKS),
        )
    )
)
register_forward(DisentangledSelfAttention.forward, as_in=FusedAttention.forward)


def _note(changed: str, options: AttentionOptions) -> None:
    if not torch.compiler.is_compiling():
        notices.fallback(changed, REMEDY, options.strict)
    elif options.strict:
        raise NotImplementedError(f"{changed}; {REMEDY}.")


def _changed_attention(module: nn.Module, forward: bool = True) -> str | None:
    """Return which code of an attention module, or code it calls, is not its own any more; None if all is."""
    if is_ours(module) or traces_questions():
        return None
    return _look_at(module, Kind.ATTENTION, forward)


@answered_once
def _look_at(module: nn.Module, kind: Kind, forward: bool) -> str | None:
    row = row_of(module, kind)
    changed = row.changed(module, forward)
    if changed is None and kind is Kind.ATTENTION:
        changed = replaced_function(row.home, row.version.home)
    return changed


def _takes_mask(attention: nn.Module, seen: set[Any]) -> bool:
    """Tell whether an attention module is fused and computes what its encoder asks for; `seen` as in `handover_of`."""
    if traces_questions():
        return fused_row(attention) is not None and refusal_of(attention) is None
    own, cls = attention.__dict__, type(attention)
    if (_takes_mask, cls) not in seen or not own.keys().isdisjoint(attention_methods()):
        if fused_row(attention) is None or _changed_attention(attention) is not None:
            return False
        if refusal_everywhere() is not None:
            return False
        seen.add((_takes_mask, cls))
    return refusal_of(attention) is None


def _fuse_again(encoder: nn.Module, options: AttentionOptions) -> None:
    """Fuse the attention modules, and all around them, that got another class of their package since the patch."""
    for attention in attention_of(encoder):
        if fused_row(attention) is not None:
            continue
        row = row_of(attention, Kind.ATTENTION)
        if not row.assigned_late or attention_refusal(attention) is not None:
            continue
        if isinstance(encoder, FusedEncoder):
            patch_class(attention, row.mixin, options)
            fuse_dense(encoder, options)
        else:
            replace_forwards()


def is_ours(module: nn.Module) -> bool:
    """Tell whether an attention module is this package's own."""
    return isinstance(module, DisentangledSelfAttention)


def attention_refusal(module: nn.Module) -> str | None:
    """Return why an attention module must be left alone; None if it may be fused."""
    if is_ours(module):
        return None
    refused = row_of(module, Kind.ATTENTION).refusal(module)
    return refused or (TALKING_HEADS[0] if mixes_heads(module) else None)


def attention_of(encoder: nn.Module) -> list[nn.Module]:
    """Return the attention modules in the layers of an encoder."""
    found = []
    layers: Any = getattr(encoder, "layer", ())
    # A list may have a way of its own to go through its layers, which is for the encoder to go once a forward.
    for layer in getattr(layers, "_modules", {}).values() or layers:
        attention = layer._modules.get("attention")
        inner = None if attention is None else attention._modules.get("self")
        if inner is not None:
            found.append(inner)
    return found
