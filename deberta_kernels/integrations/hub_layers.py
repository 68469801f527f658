"""Layers for Hugging Face's package `kernels`, which puts their forward on an encoder that is there already.

The package replaces the forward of one instance, and may put the old one back whenever it likes: for another mode, or
for another device. So nothing here outlives that forward. The attention modules inside get a class that computes
fused only what this very forward hands them, and everything else as before. A model that `patch` or `patch_all` has
changed runs their code, whichever came first.
"""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.fused import (
    FusedAttention,
    attend_unless_changed,
    attention_of,
    attention_refusal,
    encode_unless_changed,
)
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.patched_class import ORIGINAL, has_patched_class, original_forward, patch_class
from deberta_kernels.models.patching import unpatch
from deberta_kernels.models.registry import Kind, register_forward, row_of
from deberta_kernels.torch_state.onlookers import LAYER

__all__ = ["DebertaV2Encoder", "HandedAttention", "encode_in_place"]

_OPTIONS = AttentionOptions(fast_linears=False)  # the linear layers stay whose they are


class HandedAttention(FusedAttention):
    """The kernels for what a layer of this file hands over, to be mixed into an attention module."""

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
        if not isinstance(attention_mask, EncoderMask):
            return original_forward(type(self))(  # type: ignore[arg-type, no-any-return]
                self, hidden_states, attention_mask, output_attentions,
                query_states=query_states, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
            )  # fmt: skip
        return attend_unless_changed(
            self, hidden_states, attention_mask, output_attentions,
            query_states=query_states, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
        )  # fmt: skip

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as what the module was: a file must not name a copy of this package that is not there."""
        reduced = super(FusedAttention, self).__reduce_ex__(protocol)
        if not has_patched_class(self):
            return reduced
        return (copyreg._reconstructor, (type(self).patched_from, object, None), *reduced[2:])  # type: ignore[attr-defined]


register_forward(HandedAttention.forward, as_in=FusedAttention.forward)


def encode_in_place(encoder: Any, *arguments: Any, **named: Any) -> Any:
    """Run an encoder whose forward was replaced by that of a layer; arguments as of `encode`."""
    cls, attentions = type(encoder), attention_of(encoder)
    if torch.compiler.is_compiling():  # which cannot follow a change of class
        return cls.forward(encoder, *arguments, **named)
    if has_patched_class(encoder) or hasattr(cls.forward, ORIGINAL):
        if any(isinstance(attention, HandedAttention) for attention in attentions):
            unpatch(encoder)  # of `patch_all`, which looks for the modules' own classes
        return cls.forward(encoder, *arguments, **named)
    for attention in attentions:
        is_known = row_of(attention, Kind.ATTENTION).mixin is FusedAttention
        if is_known and _is_free(attention) and attention_refusal(attention) is None:
            patch_class(attention, HandedAttention, _OPTIONS)
    return encode_unless_changed(encoder, *arguments, **named)


def _is_free(attention: nn.Module) -> bool:
    """Tell whether no patch has the module: its class is its own, or that of a layer of another copy, which is off."""
    if not has_patched_class(attention):
        return True
    mixin = type(attention).__mro__[1]
    return mixin is not HandedAttention and mixin.__name__ == HandedAttention.__name__


class DebertaV2Encoder(nn.Module):
    """Fused attention for the encoder of the same name in transformers, in inference and training.

    `kernels` wants a layer to have nothing but its forward and these two marks.
    """

    has_backward = True
    can_torch_compile = False

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
        return encode_in_place(
            self, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip

    setattr(forward, LAYER, True)
