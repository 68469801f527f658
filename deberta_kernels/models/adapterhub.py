"""Compute AdapterHub's attention through the kernels: LoRA, prefixes, prompts and parallel adapters inside it.

The steps are those of `DisentangledSelfAttentionWithAdapters`, in its order. Prefixes are leading keys without a
position. What prefixes and prompts do to a padding mask is no outer product any more:

    row               sees
    prompt            every key, padding included
    real token        prefix, prompt and real tokens
    padding           prefix and prompt only

No N x N mask is built for that. The real rows need a key mask; the few other pairs are calls of their own, P keys wide
or P rows high, whose results replace those of the rows in question.

Nothing here imports `adapters` before a model of it runs.

Source: adapters 1.3.0, models/deberta_v2/modeling_deberta_v2.py; differences: masks as above, no repeated tensors where
all batches are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.models.anatomy import AttentionModule
from deberta_kernels.models.attention import (
    bind_module,
    cast_for_matmul,
    merge_heads,
    project,
)
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.position_tables import content_key
from deberta_kernels.torch_state.modes import values_readable
from deberta_kernels.types import Masks

__all__ = ["AdapterMask", "attend_with_adapters"]


class AdapterMask(EncoderMask):
    """Carry a mask through the hooks that AdapterHub puts on layers: they replicate it in place, as a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the mask the encoder was given."""
        return tuple(self.source.shape)

    def repeat(self, copies: int, *ones: int) -> AdapterMask:
        """Return this mask for a batch that is `copies` times as large."""
        parts = (self.masks.key, self.masks.query, self.masks.pair)
        masks = Masks(*(None if mask is None else mask.repeat(copies, *[1] * (mask.dim() - 1)) for mask in parts))
        return type(self)(self.source.repeat(copies, *ones), masks)

    def set_(self, other: AdapterMask) -> None:
        """Become another mask, for this layer and those after it."""
        self.__dict__.update(other.__dict__)


class _Visible(NamedTuple):
    """Say what a call's rows see, before prefixes are put in front of the keys.

    Attributes:
        mask: (B, 1, 1, Nk) or (B, 1 or H, Nq, Nk) bool, or None; goes through AdapterHub's prefix layer.
        rows: (B, Nq) bool, False = padding; None if `mask` says everything.
        prompt: number of leading rows, and keys, that are a prompt.
    """

    mask: Tensor | None
    rows: Tensor | None
    prompt: int


def attend_with_adapters(
    module: AttentionModule,
    options: AttentionOptions,
    hidden_states: Tensor,
    queries: Tensor,
    attention_mask: Tensor | EncoderMask | None,
    rel_embeddings: Tensor | None,
) -> Tensor:
    """Compute one call of AdapterHub's attention; the arguments are those of `attend`.

    Returns:
        (B', N, H * D): B' is B, or a multiple of it where parallel adapters begin inside this call.
    """
    from adapters.composition import adjust_tensors_for_parallel, match_attn_matrices_for_parallel

    q, k, v = project(module, options, queries, hidden_states)
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        q, k, v = match_attn_matrices_for_parallel(q, k, v)
    seen = _visible(attention_mask, q)
    tokens = k.shape[2]
    k, v, mask = module.prefix_tuning(k, v, hidden_states, seen.mask, False)
    k, v = cast_for_matmul(k), cast_for_matmul(v)
    q, rows = adjust_tensors_for_parallel(k, q, seen.rows)
    prefix = k.shape[2] - tokens
    rel_key = attention_mask.rel_key if isinstance(attention_mask, EncoderMask) else content_key
    run = bind_module(module, options, (q, k, v), rel_embeddings, tokens, rel_key=rel_key, prefix_length=prefix)
    if rows is None:
        masks = parse_huggingface_mask(mask, batch=q.shape[0], nq=q.shape[2], nk=k.shape[2])
        return merge_heads(run(q, k, v, masks=masks))
    keys = mask[:, 0, 0]
    if prefix + seen.prompt == 0:
        return merge_heads(run(q, k, v, masks=Masks(key=keys, query=rows)))
    context = merge_heads(run(q, k, v, masks=Masks(key=keys)))
    if _is_full(rows):
        return context
    return _replace_rows(run, q, k, v, context, keys, rows, prefix, seen.prompt)


def _visible(attention_mask: Tensor | EncoderMask | None, q: Tensor) -> _Visible:
    from adapters.composition import adjust_tensors_for_parallel
    from adapters.utils import prefix_attention_mask

    if attention_mask is None:
        return _Visible(None, None, 0)
    if isinstance(attention_mask, EncoderMask):
        if attention_mask.source.device != q.device:
            attention_mask = attention_mask.to(q.device)
        tokens = attention_mask.masks.key
        if attention_mask.source.dim() == 2 and tokens is not None:
            rows = prefix_attention_mask(tokens, dim=1, prefix_value=1)
            prompt = rows.shape[1] - tokens.shape[1]
            (rows,) = adjust_tensors_for_parallel(q, rows)
            return _Visible(rows[:, None, None], rows, prompt)
        attention_mask = attention_mask.dense()
    pairs = prefix_attention_mask(attention_mask, dim=3, prefix_value=1)
    pairs = prefix_attention_mask(pairs, dim=2, prefix_value=1)
    (pairs,) = adjust_tensors_for_parallel(q, pairs)
    return _Visible(pairs != 0, None, 0)


def _replace_rows(
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Tensor,
    keys: Tensor,
    rows: Tensor,
    prefix: int,
    prompt: int,
) -> Tensor:
    """Replace what the padded and the prompt's rows see; context is that of the real rows, (B, N, H * D)."""
    leading = prefix + prompt
    alone = run(q, k[:, :, :leading], v[:, :, :leading], masks=Masks(key=keys[:, :leading]))
    context = torch.where(rows[:, :, None], context, merge_heads(alone))
    if prompt == 0:
        return context
    is_token = torch.arange(keys.shape[1], device=keys.device) >= leading
    first = run(q[:, :, :prompt], k, v, masks=Masks(key=keys | is_token))
    return torch.cat([merge_heads(first), context[:, prompt:]], dim=1)


def _is_full(rows: Tensor) -> bool:
    """Tell whether no row is padding, where that can be read without waiting for a device."""
    return rows.device.type == "cpu" and values_readable(rows) and bool(rows.all())
