"""Run Hugging Face's DeBERTa encoders without any N x N tensor and, where that pays, without padding.

The (B, N) mask is parsed once and carried to every layer; the layers get no relative positions, which means ordinary
distances. When enough of a batch is padding, the layers get the real tokens packed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.models.anatomy import anatomy_of
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.guards.allow_list import runs_original_code
from deberta_kernels.models.guards.handover import Handover, handover_of, is_known_convolution
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.packing import Packing, find_packing
from deberta_kernels.models.padding_gradient import PackedLayer
from deberta_kernels.torch_state.modes import values_readable
from deberta_kernels.types import Masks

__all__ = ["encode"]

# Finding a packing takes a few passes over the states: it pays when a twentieth of them goes away.
_FULLEST = 0.95
_FEWEST_TOKENS = 32


def encode(
    module: Any,
    options: AttentionOptions,
    original: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_hidden_states: bool = True,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    return_dict: bool = True,
    *,
    takes_mask: Callable[[nn.Module, set[Any]], bool],
    mask_type: type[EncoderMask] = EncoderMask,
) -> Any:
    """Run the encoder; arguments and result are Hugging Face's.

    Args:
        module: `DebertaV2Encoder`, or `DebertaEncoder` of DeBERTa v1.
        options: see `AttentionOptions`.
        original: its original forward, unbound; runs what its attention modules would refuse, so that they see, and
            report, what the caller passed.
        hidden_states: (B, N, hidden size).
        attention_mask: (B, N), (B, N, N) or (B, 1 or H, N, N); not 0 = keep.
        output_hidden_states: also return the states after each layer.
        output_attentions: runs the original code.
        query_states: (B, N, hidden size) or None; another shape, or DeBERTa v1, runs the original code.
        relative_pos: None; a tensor runs the original code.
        return_dict: return a `BaseModelOutput`, not a tuple.
        takes_mask: as in `handover_of`.
        mask_type: what attention modules get in place of the mask; those with a type of their own may give the states
            more tokens and samples than the mask has.
    """
    adapted = mask_type is not EncoderMask
    plain = isinstance(hidden_states, Tensor) and hidden_states.dim() == 3 and isinstance(attention_mask, Tensor)
    if (
        not plain
        or attention_mask.dim() not in (2, 3, 4)
        or output_attentions
        or relative_pos is not None
        or (query_states is not None and not _takes_queries(module, query_states, hidden_states))
        or runs_original_code()
    ):
        return original(
            module, hidden_states, attention_mask, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, query_states=query_states, relative_pos=relative_pos,
            return_dict=return_dict,
        )  # fmt: skip
    if attention_mask.dim() == 2 and not _multiplies_as_it_keeps(hidden_states, attention_mask):
        return original(
            module, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip
    batch, length, _ = hidden_states.shape
    if adapted:
        batch, length = attention_mask.shape[0], attention_mask.shape[-1]
    masks = parse_huggingface_mask(attention_mask, batch=batch, nq=length, nk=length)
    if not adapted and masks.key is not None and _is_full(hidden_states, masks.key):
        masks = Masks()  # which also leaves nothing to pack
    layers = _Layers(module, mask_type(attention_mask, masks), takes_mask, adapted)
    packing = None
    if attention_mask.dim() == 2 and query_states is None and masks.key is not None:
        packing = _packing(layers, options, hidden_states, masks.key)
    last, states = layers.run(hidden_states, query_states, packing, output_hidden_states)
    if not return_dict:
        return (last,) if states is None else (last, states)
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=last, hidden_states=states, attentions=None)


def _takes_queries(module: Any, query_states: Tensor, hidden_states: Tensor) -> bool:
    return query_states.shape == hidden_states.shape and all(
        anatomy_of(part).takes_queries for part in module.modules()
    )


def _packing(layers: _Layers, options: AttentionOptions, hidden_states: Tensor, keep: Tensor) -> Packing | None:
    """Return how to pack the batch; None where it must, or had better, run padded."""
    batch, length = keep.shape
    if options.unpad is False or batch * length == 0 or not values_readable(hidden_states, keep):
        return None
    if options.unpad == "auto" and batch * length < _FEWEST_TOKENS:
        return None
    if not layers.begins_packed():
        return None
    return find_packing(keep, hidden_states, _FULLEST if options.unpad == "auto" else 1.0)


def _multiplies_as_it_keeps(hidden_states: Tensor, mask: Tensor) -> bool:
    """Tell whether the products of a mask's values, which Hugging Face's mask is made of, are not 0 where both are not.

    Products of 0 and 1 are; those of other values may overflow, and NaN and infinity make 0 something else.
    """
    if mask.dtype == torch.bool or mask.device.type != "cpu" or not values_readable(hidden_states, mask):
        return True
    return bool(((mask == 0) | (mask == 1)).all())


def _is_full(hidden_states: Tensor, keep: Tensor) -> bool:
    """Tell whether every token is real, where that can be read without waiting for a device."""
    return keep.device.type == "cpu" and values_readable(hidden_states, keep) and bool(keep.all())


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


class _Layers:
    """The layers of an encoder in one forward.

    Args:
        module: the encoder.
        mask: what layers are given that take it.
        takes_mask: as in `encode`.
        adapted: as in `handover_of`.
    """

    def __init__(self, module: Any, mask: EncoderMask, takes_mask: Any, adapted: bool) -> None:
        self.module, self.mask, self.takes_mask, self.adapted = module, mask, takes_mask, adapted
        self._seen: set[Any] = set()
        self._given: Any = None  # what the encoder was given, states and queries
        self._tensors: tuple[Tensor, Tensor | None] | None = None  # mask and distances as Hugging Face makes them
        self._versions: list[int] = []  # theirs, when they were made

    def begins_packed(self) -> bool:
        """Tell whether the first layer takes packed states; each other one is asked in its turn."""
        return len(self.module.layer) > 0 and self._handover(self.module.layer[0]) is Handover.PACKED

    def run(
        self, states: Tensor, queries: Tensor | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run all layers from (B, N, C) states; return the last ones, and if `keep` those before and after each."""
        given = output = states
        self._given = given, queries
        rel_embeddings = self.module.get_rel_embedding()
        self._seen.clear()  # its norm may have a hook
        rows: Tensor | None = None  # the packed form of states
        kept, last = [given], None
        for number, layer in enumerate(self.module.layer):
            handover = self._handover(layer)
            if handover is not Handover.PACKED:
                packing = rows = None
            elif number == 0 and packing is None:
                # A tensor of its own, whose gradients are then summed before the convolution's are added, with and
                # without checkpoints.
                states = states.view_as(states)
            if self.mask.packing is not packing:  # another object: a checkpoint may have kept this one
                self.mask = self.mask.packed(packing)
            self.mask.begin_layer(closed=handover is Handover.PACKED)
            if packing is None:
                output = self._call(layer, handover, states, queries, rel_embeddings)
            elif torch.is_grad_enabled():
                last = PackedLayer(layer, packing, last)
                output = last.unpack(self._call(layer, handover, last.pack(states), None, rel_embeddings))
            else:
                rows = packing.pack(states) if rows is None else rows
                rows = self._call(layer, handover, rows, None, rel_embeddings)
                output = packing.unpack(rows)
            if handover is not Handover.PACKED:
                self._seen.clear()  # code that is not known may have run
            convolution = getattr(self.module, "conv", None) if number == 0 else None  # DeBERTa v1 has none
            if convolution is not None:
                is_known = is_known_convolution(convolution)
                output, rows = self._convolve(convolution, given, output), None
                if not is_known:
                    packing = None
                    self.mask = self.mask.packed(None)
                    self._seen.clear()
            if keep:
                kept.append(output)
            if queries is None:
                states = output
            else:
                queries = output
        return output, tuple(kept) if keep else None

    def _convolve(self, convolution: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        source = self.mask.source
        return convolution(given, output, source if source.dim() == 2 else source.sum(-2) > 0)  # type: ignore[no-any-return]

    def _handover(self, layer: Any) -> Handover:
        handover = handover_of(layer, self.module, self.takes_mask, self.adapted, self._seen)
        if handover is Handover.TENSORS or self._tensors_changed():
            return Handover.TENSORS
        if torch.compiler.is_compiling():  # looked at in traced code, which is compiled anew when a setting changes
            attention = layer.attention.self
            if not anatomy_of(attention).agrees(self.module, attention):
                return Handover.TENSORS
        return handover

    def _tensors_changed(self) -> bool:
        """Tell whether a layer changed, in place, the mask or the distances that all layers share."""
        if self._tensors is None or torch.compiler.is_compiling():
            return False
        return self._versions != list(map(_version, self._tensors))

    def _call(
        self, layer: Any, handover: Handover, keys: Tensor, queries: Tensor | None, rel_embeddings: Tensor | None
    ) -> Tensor:
        output: Tensor
        if handover is Handover.TENSORS:
            mask, relative_pos = self._as_hugging_face()
            output, _ = layer(
                keys, mask, query_states=queries, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
                output_attentions=False,
            )  # fmt: skip
        elif getattr(layer, "gradient_checkpointing", False) and layer.training:
            # A reentrant checkpoint differentiates positional arguments only, each layer on its own. By keyword, the
            # normalised relative embeddings would be one graph that every layer's backward runs through again.
            output, _ = layer(keys, self.mask, queries, None, rel_embeddings, False)
        else:
            output, _ = layer(
                keys, self.mask, query_states=queries, relative_pos=None, rel_embeddings=rel_embeddings,
                output_attentions=False,
            )  # fmt: skip
        return output

    def _as_hugging_face(self) -> tuple[Tensor, Tensor | None]:
        """Return the mask and the distances that Hugging Face's encoder makes, once for all layers."""
        if self._tensors is None:
            hidden_states, queries = self._given
            mask = self.module.get_attention_mask(self.mask.source)
            self._tensors = mask, self.module.get_rel_pos(hidden_states, queries, None)
            self._versions = list(map(_version, self._tensors))
        return self._tensors
