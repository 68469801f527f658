"""Run Hugging Face's DeBERTa encoders without any N x N tensor and, where that pays, without padding.

The (B, N) mask is parsed once and carried to every layer; the layers get no relative positions, which means ordinary
distances. When enough of a batch is padding, the layers get the real tokens packed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from deberta_kernels.integrations.adapter_attention import AdapterMask
from deberta_kernels.integrations.swap import Swapped, base_class, original_forward
from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.modules.anatomy import is_version_one
from deberta_kernels.modules.encoder_mask import EncoderMask
from deberta_kernels.modules.options import AttentionOptions
from deberta_kernels.modules.packing import Packing, find_packing
from deberta_kernels.modules.self_attention import refusal_of, runs_original_code

__all__ = ["encode"]

_MODELING = ("transformers.models.deberta.", "transformers.models.deberta_v2.")
# Packages whose modules compute each token from that token alone.
_TOKENWISE = ("torch.nn.", "transformers.", "peft.tuners.", "deberta_kernels.", "bitsandbytes.", "torchao.")
_HARMLESS_HOOKS = ("torch.", "accelerate.")
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
    adapted: bool = False,
) -> Any:
    """Run the encoder, all of whose attention modules are fused; arguments and result are Hugging Face's.

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
        adapted: the attention modules are AdapterHub's, which may give the states more tokens and samples than the
            mask has.
    """
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
    batch, length, _ = hidden_states.shape
    if adapted:
        batch, length = attention_mask.shape[0], attention_mask.shape[-1]
    masks = parse_huggingface_mask(attention_mask, batch=batch, nq=length, nk=length)
    packing = None
    if not adapted and attention_mask.dim() == 2 and query_states is None and masks.key is not None:
        packing = _packing(module, options, hidden_states, masks.key)
    mask = (AdapterMask if adapted else EncoderMask)(attention_mask, masks, packing)
    last, states = _run_layers(module, hidden_states, mask, query_states, output_hidden_states)
    if not return_dict:
        return (last,) if states is None else (last, states)
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=last, hidden_states=states, attentions=None)


def _takes_queries(module: Any, query_states: Tensor, hidden_states: Tensor) -> bool:
    one = any(is_version_one(layer.attention.self) for layer in module.layer)
    return not one and query_states.shape == hidden_states.shape


def _packing(module: Any, options: AttentionOptions, hidden_states: Tensor, keep: Tensor) -> Packing | None:
    """Return how to pack the batch; None where it must, or had better, run padded."""
    batch, length = keep.shape
    if options.unpad is False or batch * length == 0 or not _readable(hidden_states, keep):
        return None
    if _has_any_global_hook():
        return None
    if options.unpad == "auto" and batch * length < _FEWEST_TOKENS:
        return None
    packing = find_packing(keep, hidden_states, _FULLEST if options.unpad == "auto" else 1.0)
    return packing if packing is not None and _takes_packed_states(module) else None


def _readable(hidden_states: Tensor, keep: Tensor) -> bool:
    """Tell whether the mask may be read: not while compiling, of fake or wrapped tensors, or in a graph capture."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if type(hidden_states) is not Tensor or type(keep) is not Tensor or hidden_states.is_meta:
        return False
    return not (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing())


def _takes_packed_states(module: Any) -> bool:
    """Tell whether nothing inside the layers could notice that it gets (1, rows, C) in place of (B, N, C).

    The classes that route states must be Hugging Face's own, and everything below them of packages whose modules treat
    each token alike. A hook may look at anything, unless it is one of those that move or gather weights.
    """
    for layer in module.layer:
        routes = (layer, layer.attention, layer.attention.output, layer.intermediate, layer.output)
        if any(not _home(part).startswith(_MODELING) or not _runs_own_forward(part) for part in routes):
            return False
        for part in layer.modules():
            if not _home(part).startswith(_TOKENWISE) and not isinstance(part, Swapped):
                return False
            if ("forward" in part.__dict__ and "_old_forward" not in part.__dict__) or _is_watched(part):
                return False
        if refusal_of(layer.attention.self) is not None:
            return False
    return True


def _home(part: Any) -> str:
    """Return where the class of a module was written; FSDP2 puts one of its own in front that adds only hooks."""
    return next(c.__module__ for c in type(part).__mro__ if not c.__module__.startswith("torch.distributed.fsdp"))


def _runs_own_forward(part: Any) -> bool:
    """Tell whether the forward of a module's class is the one it was written with."""
    return original_forward(base_class(part)).__module__.startswith(_MODELING)


def _is_mask_watched(layer: Any) -> bool:
    """Tell whether a hook sees the mask before a layer or its attention does, and would expect a tensor."""
    return any(_any_harmful(part._forward_pre_hooks) for part in (layer, layer.attention, layer.attention.self))


def _is_watched(part: Any) -> bool:
    kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(map(_any_harmful, kinds))


def _any_harmful(hooks: Any) -> bool:
    return any(not str(getattr(hook, "__module__", "")).startswith(_HARMLESS_HOOKS) for hook in hooks.values())


def _run_layers(
    module: Any, hidden_states: Tensor, mask: EncoderMask, query_states: Tensor | None, keep_states: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    rel_embeddings = module.get_rel_embedding()
    convolution: Any = getattr(module, "conv", None)  # DeBERTa v1 has none
    packing, source = mask.packing, mask.source
    states = [hidden_states]
    # A tensor of its own for the first layer, whose gradients are then summed before the convolution's are added, with
    # and without checkpoints.
    keys = hidden_states.view_as(hidden_states) if packing is None else packing.pack(hidden_states)
    padded = hidden_states
    for number, layer in enumerate(module.layer):
        output = _run_layer(layer, keys, mask, query_states, rel_embeddings)
        convolves = number == 0 and convolution is not None
        if packing is None:
            padded = output
        elif convolves or keep_states or number == len(module.layer) - 1:
            padded = packing.unpack(output)
        if convolves:
            padded = convolution(hidden_states, padded, source if source.dim() == 2 else source.sum(-2) > 0)
        if packing is not None and (convolves or (keep_states and torch.is_grad_enabled())):
            output = packing.pack(padded)  # from the very states that are returned, which are part of the graph
        elif convolves:
            output = padded
        states.append(padded)
        if query_states is None:
            keys = output
        else:
            query_states = output
    return padded, tuple(states) if keep_states else None


def _run_layer(
    layer: Any, keys: Tensor, mask: EncoderMask, query_states: Tensor | None, rel_embeddings: Tensor | None
) -> Tensor:
    given = mask.dense() if type(mask) is EncoderMask and _is_mask_watched(layer) else mask
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        # A reentrant checkpoint differentiates positional arguments only, each layer on its own. By keyword, the
        # normalised relative embeddings would be one graph that every layer's backward runs through again.
        result = layer(keys, given, query_states, None, rel_embeddings, False)
    else:
        result = layer(
            keys, given, query_states=query_states, relative_pos=None, rel_embeddings=rel_embeddings,
            output_attentions=False,
        )  # fmt: skip
    output: Tensor = result[0]
    return output
