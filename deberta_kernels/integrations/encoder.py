"""Run Hugging Face's DeBERTa-v2 encoder without any N x N tensor: no pair mask, no relative positions.

The (B, N) mask is parsed once and carried to every layer; the layers get no relative positions, which means ordinary
distances. The whole encoder runs padded: packing away its padding is not part of this release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.modules.self_attention import EncoderMask, runs_original_code

__all__ = ["encode"]


def encode(
    module: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_hidden_states: bool = True,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """Run the encoder, all of whose attention modules are fused; arguments and result are Hugging Face's.

    Args:
        module: `DebertaV2Encoder`.
        original: its original forward, unbound; runs what its attention modules would refuse, so that they see, and
            report, what the caller passed.
        hidden_states: (B, N, hidden size).
        attention_mask: (B, N), (B, N, N) or (B, 1 or H, N, N); not 0 = keep.
        output_hidden_states: also return the states after each layer.
        output_attentions: runs the original code.
        query_states: (B, N, hidden size) or None; another shape runs the original code.
        relative_pos: None; a tensor runs the original code.
        return_dict: return a `BaseModelOutput`, not a tuple.
    """
    plain = isinstance(hidden_states, Tensor) and hidden_states.dim() == 3 and isinstance(attention_mask, Tensor)
    if (
        not plain
        or attention_mask.dim() not in (2, 3, 4)
        or output_attentions
        or relative_pos is not None
        or (query_states is not None and query_states.shape != hidden_states.shape)
        or runs_original_code()
    ):
        return original(
            module, hidden_states, attention_mask, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, query_states=query_states, relative_pos=relative_pos,
            return_dict=return_dict,
        )  # fmt: skip
    batch, length, _ = hidden_states.shape
    mask = EncoderMask(attention_mask, parse_huggingface_mask(attention_mask, batch=batch, nq=length, nk=length))
    last, states = _run_layers(module, hidden_states, mask, query_states, output_hidden_states)
    if not return_dict:
        return (last,) if states is None else (last, states)
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=last, hidden_states=states, attentions=None)


def _run_layers(
    module: Any, hidden_states: Tensor, mask: EncoderMask, query_states: Tensor | None, keep_states: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    rel_embeddings = module.get_rel_embedding()
    states = [hidden_states]
    keys, output = hidden_states, hidden_states
    for number, layer in enumerate(module.layer):
        output = _run_layer(layer, keys, mask, query_states, rel_embeddings)
        if number == 0 and module.conv is not None:
            source = mask.source
            output = module.conv(hidden_states, output, source if source.dim() == 2 else source.sum(-2) > 0)
        states.append(output)
        if query_states is None:
            keys = output
        else:
            query_states = output
    return output, tuple(states) if keep_states else None


def _run_layer(
    layer: Any, keys: Tensor, mask: EncoderMask, query_states: Tensor | None, rel_embeddings: Tensor | None
) -> Tensor:
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        # A reentrant checkpoint differentiates positional arguments only, each layer on its own. By keyword, the
        # normalised relative embeddings would be one graph that every layer's backward runs through again.
        result = layer(keys, mask, query_states, None, rel_embeddings, False)
    else:
        result = layer(
            keys, mask, query_states=query_states, relative_pos=None, rel_embeddings=rel_embeddings,
            output_attentions=False,
        )  # fmt: skip
    output: Tensor = result[0]
    return output
