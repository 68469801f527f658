"""AdapterHub's DeBERTa: its attention through the kernels, and what else this package knows of the package `adapters`.

LoRA, prefixes, prompts and parallel adapters are computed inside the attention.

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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear, register_linear
from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.models.anatomy import VERSION_ONE, VERSION_TWO, AttentionModule
from deberta_kernels.models.attention import bind_module, cast_for_matmul, merge_heads, project
from deberta_kernels.models.dense import original_if_changed
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.fused import FusedAttention, attend_unless_changed
from deberta_kernels.models.options import AttentionOptions, options_of
from deberta_kernels.models.patched_class import Patched
from deberta_kernels.models.position_tables import content_key, register_row_wise
from deberta_kernels.models.registry import Kind, ModuleClass, register
from deberta_kernels.torch_state.modes import values_readable
from deberta_kernels.torch_state.onlookers import register_hooks
from deberta_kernels.types import Masks

__all__ = ["AdapterMask", "FusedAdapterAttention", "FusedAdapterOutput", "attend_with_adapters"]


class AdapterMask(EncoderMask):
    """A mask that survives the hooks which AdapterHub puts on layers: they replicate it in place, as a tensor."""

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
    """What a call's rows see, before prefixes are put in front of the keys.

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
    k, v = cast_for_matmul(k, v)
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


class FusedAdapterAttention(FusedAttention):
    """The kernels, to be mixed into one attention module that AdapterHub made its own."""

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


_attend = partial(attend_unless_changed, compute=attend_with_adapters)


class FusedAdapterOutput(Patched):
    """A fast linear layer, to be mixed into the same modules of AdapterHub, which go on with bottleneck adapters."""

    dense: nn.Linear
    dropout: nn.Module
    LayerNorm: nn.Module
    bottleneck_layer_forward: Callable[[Tensor, Tensor, nn.Module], Tensor]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Project hidden_states, run the adapters, and add input_tensor; see `FusedOutput`."""
        options = options_of(self)  # type: ignore[arg-type]
        original = original_if_changed(self, options)
        if original is not None:
            return original(self, hidden_states, input_tensor)  # type: ignore[no-any-return]
        projected = apply_linear(self.dense, hidden_states, options.fast_linears is True, options.strict)
        projected = drop_and_add(self.dropout, projected, strict=options.strict)
        return self.bottleneck_layer_forward(projected, input_tensor, self.LayerNorm)


def _is_plain_linear(layer: Any) -> bool:
    """Tell whether one of AdapterHub's linear layers has no adapter that is active, or one merged into its weight."""
    return not layer.fan_in_fan_out and (bool(layer.merged) or layer.get_active_setup() is None)


_HOME, _HOME_ONE = "adapters.models.deberta_v2.modeling_deberta_v2", "adapters.models.deberta.modeling_deberta"
_LORA = "adapters.methods.lora"
_BIAS = ("transpose_for_scores",)
register(
    *(
        ModuleClass(
            Kind.ATTENTION, version, home, "DisentangledSelfAttentionWithAdapters", FusedAdapterAttention, _attend,
            methods, mask_type=AdapterMask, assigned_late=True,
        )
        for version, home, methods in (
            (VERSION_TWO, _HOME, ("disentangled_attention_bias", *_BIAS, "transpose_for_scores_extended")),
            (VERSION_ONE, _HOME_ONE, ("disentangled_att_bias", *_BIAS)),
        )
    ),
    *(
        ModuleClass(Kind.OUTPUT, version, home, f"{prefix}{name}WithAdapters", FusedAdapterOutput)
        for version, home, prefix in ((VERSION_TWO, _HOME, "DebertaV2"), (VERSION_ONE, _HOME_ONE, "Deberta"))
        for name in ("Output", "SelfOutput")
    ),
)  # fmt: skip
# AdapterHub makes every linear layer its own. Most never get an adapter.
register_linear(_LORA, "LoRALinearTorch", "LoRALinear.forward", _is_plain_linear)
register_linear(_LORA, "LoRAMergedLinear", "LoRAMergedLinear.forward", _is_plain_linear)
# Gates average over all rows.
register_row_wise("adapters.methods.", gate="use_gating")
# Hooks of its layers, whose states are never packed; they take the mask object for a tensor.
register_hooks(
    ("adapters.methods.prompt_tuning", "_attn_mask_hook_fn"),
    ("adapters.methods.reft", "hook_fn"),
    ("adapters.models.bert.mixin_bert", "BertModelAdaptersMixin._set_layer_hook_for_parallel.<locals>.hook"),
)
