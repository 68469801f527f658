"""Hugging Face's DeBERTa encoders, run without any N x N tensor and, where that pays, without padding.

The (B, N) mask is parsed once and carried to every layer; the layers get no relative positions, which means ordinary
distances. When enough of a batch is padding, the layers get the real tokens packed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from itertools import chain, islice
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
from deberta_kernels.torch_state.modes import dispatch_mode, values_readable
from deberta_kernels.torch_state.onlookers import hooks_registered
from deberta_kernels.torch_state.originals import is_own
from deberta_kernels.types import Masks

__all__ = ["encode"]

# Finding a packing takes a few passes over the states: it pays when a twentieth of them goes away.
_FULLEST = 0.95
# Of fewer tokens the padding takes less time than leaving it out: layers mostly wait for their weights then.
_FEWEST_TOKENS = 32
_ITERATION = ("torch.nn.modules.container", "ModuleList.__iter__")


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
    is_plain = not output_attentions and relative_pos is None and not runs_original_code()
    fits = is_plain and _fits(module, hidden_states, attention_mask, query_states)
    found = _read(hidden_states, attention_mask) if fits else _Values.OTHERS
    if found is _Values.OTHERS:
        return original(
            module, hidden_states, attention_mask, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, query_states=query_states, relative_pos=relative_pos,
            return_dict=return_dict,
        )  # fmt: skip
    batch, length, _ = hidden_states.shape
    if adapted:
        batch, length = attention_mask.shape[0], attention_mask.shape[-1]
    masks = parse_huggingface_mask(attention_mask, batch=batch, nq=length, nk=length)
    if not adapted and masks.key is not None and found is _Values.ONES:
        masks = Masks()  # which also leaves nothing to pack
    layers = _Layers(module, mask_type(attention_mask, masks), takes_mask, adapted)
    keep = masks.key if attention_mask.dim() == 2 and query_states is None else None
    find = None if keep is None else partial(_packing, options, hidden_states, keep)
    last, states = layers.run(hidden_states, query_states, find, output_hidden_states)
    if not return_dict:
        return (last,) if states is None else (last, states)
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=last, hidden_states=states, attentions=None)


def _fits(module: Any, hidden_states: Any, attention_mask: Any, query_states: Tensor | None) -> bool:
    """Tell whether the states and the mask have types and dimensions that Hugging Face's encoder is meant for."""
    if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
        return False
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 3, 4):
        return False
    if query_states is None:
        return True
    same = query_states.shape == hidden_states.shape
    return same and all(anatomy_of(part).takes_queries for part in module.modules())


def _packing(options: AttentionOptions, hidden_states: Tensor, keep: Tensor, first: Handover) -> Packing | None:
    """Return how to pack the batch; None where it must, or had better, run padded, and where the first layer must."""
    batch, length = keep.shape
    if options.unpad is False or batch * length == 0 or not values_readable(hidden_states, keep):
        return None
    if first is not Handover.PACKED or (options.unpad == "auto" and batch * length < _FEWEST_TOKENS):
        return None
    return find_packing(keep, hidden_states, _FULLEST if options.unpad == "auto" else 1.0)


class _Values(Enum):
    """What a mask holds, where that can be read without waiting for a device."""

    UNKNOWN = 0
    ONES = 1
    ZEROS_AND_ONES = 2
    # Hugging Face multiplies the values of a (B, N) mask: others may overflow, and NaN and infinity make 0 another.
    OTHERS = 3


def _read(hidden_states: Tensor, mask: Tensor) -> _Values:
    if mask.device.type != "cpu" or not values_readable(hidden_states, mask):
        return _Values.UNKNOWN
    ones = mask == 1
    if bool(ones.all()):
        return _Values.ONES
    if mask.dim() == 2 and mask.dtype != torch.bool and not bool((ones | (mask == 0)).all()):
        return _Values.OTHERS
    return _Values.ZEROS_AND_ONES


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


class _Packed:
    """States between two layers in packed form, and in padded form once somebody needs that."""

    def __init__(self, rows: Tensor, packing: Packing) -> None:
        self.rows = rows
        self.packing = packing
        self.unpacked: Tensor | None = None


def _padded(states: Tensor | _Packed) -> Tensor:
    if isinstance(states, Tensor):
        return states
    if states.unpacked is None:
        states.unpacked = states.packing.unpack(states.rows)
    return states.unpacked


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
        self._ahead: dict[nn.Module, Handover] = {}  # what layers may be handed, as long as `_hooks` is true
        self._hooks = -1
        self._last: PackedLayer | None = None  # the last layer that ran packed, where gradients are wanted
        self._given: Any = None  # what the encoder was given, states and queries
        self._tensors: tuple[Tensor, Tensor | None] | None = None  # mask and distances as Hugging Face makes them
        self._versions: list[int] = []  # theirs, when they were made

    def run(
        self, given: Tensor, queries: Tensor | None, find: Callable[[Handover], Packing | None] | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run all layers from (B, N, C) states; return the last ones, and if `keep` those before and after each.

        `find` returns how to pack the batch, given what the first layer may be handed; None where nothing is packed.
        Each other layer is asked in its turn.
        """
        self._given = given, queries
        rel_embeddings = self.module.get_rel_embedding()
        kept, packing = [given], None
        states: Tensor | _Packed = given
        output: Tensor | _Packed = given
        for number, layer in enumerate(self.module.layer):
            handover = self._handover(number, layer)
            if number == 0 and find is not None:
                packing = find(handover)
            if handover is not Handover.PACKED:
                packing = None
            elif number == 0 and packing is None:
                # A tensor of its own, whose gradients are then summed before the convolution's are added, with and
                # without checkpoints.
                states = given.view_as(given)
            if self.mask.packing is not packing:  # another object: a checkpoint may have kept this one
                self.mask = self.mask.packed(packing)
            self.mask.begin_layer(closed=handover is Handover.PACKED)
            if packing is None:
                output = self._call(layer, handover, _padded(states), queries, rel_embeddings)
            else:
                output = self._call_packed(layer, packing, states, rel_embeddings)
            if handover is not Handover.PACKED:
                self._begin_anew()
            convolution = getattr(self.module, "conv", None) if number == 0 else None  # DeBERTa v1 has none
            if convolution is not None:
                is_known = is_known_convolution(convolution)
                output = self._convolve(convolution, given, _padded(output))
                if not is_known:
                    packing = None
                    self.mask = self.mask.packed(None)  # which forgets what it has read
                    self._begin_anew()
            if keep:
                kept.append(_padded(output))
            if queries is None:
                states = output
            else:
                queries = _padded(output)
        return _padded(output), tuple(kept) if keep else None

    def _convolve(self, convolution: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        source = self.mask.source
        return convolution(given, output, source if source.dim() == 2 else source.sum(-2) > 0)  # type: ignore[no-any-return]

    def _handover(self, number: int, layer: Any) -> Handover:
        if torch.compiler.is_compiling():
            handover = handover_of(layer, self.module, self.takes_mask, self.adapted, self._seen)
        else:
            if layer not in self._ahead or self._hooks != hooks_registered():
                self._look_ahead(number, layer)
            handover = self._ahead[layer]
        if handover is Handover.TENSORS or (self._tensors is not None and self._tensors_changed(*self._tensors)):
            return Handover.TENSORS
        if torch.compiler.is_compiling():  # looked at in traced code, which is compiled anew when a setting changes
            attention = layer.attention.self
            if not anatomy_of(attention).agrees(self.module, attention):
                return Handover.TENSORS
        return handover

    def _look_ahead(self, number: int, layer: Any) -> None:
        """Decide for a layer and, while nothing but known code runs in them, for those that follow.

        Nobody can change what was decided meanwhile, unless a mode sees every operator, or a list with a way of its own
        to go through its layers does: such a list may also draw which of them run.
        """
        self._ahead, self._hooks = {}, hooks_registered()
        layers = self.module.layer
        following = islice(layers, number + 1, None) if is_own(type(layers).__iter__, *_ITERATION) else ()
        for each in chain((layer,), following):
            handover = handover_of(each, self.module, self.takes_mask, self.adapted, self._seen)
            self._ahead[each] = handover
            if handover is not Handover.PACKED or dispatch_mode():
                return

    def _begin_anew(self) -> None:
        """Forget what was found: code that is not known may have run."""
        self._seen.clear()
        self._ahead.clear()

    def _tensors_changed(self, *tensors: Tensor | None) -> bool:
        """Tell whether a layer changed, in place, the mask or the distances that all layers share."""
        return not torch.compiler.is_compiling() and self._versions != list(map(_version, tensors))

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

    def _call_packed(
        self, layer: Any, packing: Packing, states: Tensor | _Packed, rel_embeddings: Tensor | None
    ) -> Tensor | _Packed:
        if torch.is_grad_enabled():
            self._last = PackedLayer(layer, packing, self._last)
            rows = self._last.pack(_padded(states))
            return self._last.unpack(self._call(layer, Handover.PACKED, rows, None, rel_embeddings))
        rows = states.rows if isinstance(states, _Packed) else packing.pack(states)
        return _Packed(self._call(layer, Handover.PACKED, rows, None, rel_embeddings), packing)

    def _as_hugging_face(self) -> tuple[Tensor, Tensor | None]:
        """Return the mask and the distances that Hugging Face's encoder makes, once for all layers."""
        if self._tensors is None:
            hidden_states, queries = self._given
            mask = self.module.get_attention_mask(self.mask.source)
            self._tensors = mask, self.module.get_rel_pos(hidden_states, queries, None)
            self._versions = list(map(_version, self._tensors))
        return self._tensors
