"""Hugging Face's disentangled self-attention, computed through the kernels.

`attend` is the one implementation: the stand-alone module and patched Hugging Face modules both call it. It decides by
the allow-list; a call outside it goes to the original code, or to what stands for it. Where a patched encoder has
decided already, its mask says so, and a call without gradients takes this way:

    attend_fused         nothing to keep for a backward
    _fused               projections of the states; `bind_module` gets the position tables, kept from earlier calls
    api.run_attention    checks
    dispatch.choose      the backend
    forward              of that backend: fills the arguments of the kernel
    the kernel

A mask has four forms on the way: the caller's tensor; `Masks`, parsed once a forward; `EncoderMask`, which carries that
object from layer to layer; and the backend's arguments. `AttentionProblem` holds the same `Masks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deberta_kernels import dispatch, notices
from deberta_kernels.api import run_attention
from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.models.anatomy import AttentionModule, anatomy_of
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.guards.allow_list import refusal, runs_original_code
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.packing import Packing
from deberta_kernels.models.position_tables import PositionTables, content_key, projected_tables
from deberta_kernels.types import AttentionProblem, Masks

__all__ = [
    "attend",
    "attend_fused",
    "bind_module",
    "cast_for_matmul",
    "merge_heads",
    "project",
]


def attend(
    module: AttentionModule,
    options: AttentionOptions,
    original: Callable[..., tuple[Tensor, Tensor | None]],
    hidden_states: Tensor,
    attention_mask: Tensor | EncoderMask | None,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    *,
    compute: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run one attention call: through the kernels where it is on the allow-list, else through `original`.

    Args:
        module: attention module with Hugging Face's attributes.
        options: see `AttentionOptions`.
        original: the original forward, an unbound function.
        hidden_states: (B, N, hidden size); keys and values.
        attention_mask: what a patched encoder hands over; or Hugging Face's mask, broadcastable to (B, H, N, N), not
            0 = keep; None masks nothing.
        output_attentions: also return the probabilities; outside the allow-list.
        query_states: (B, N, hidden size) or None for hidden_states; another length is outside the allow-list.
        relative_pos: None for ordinary distances, or in DeBERTa v1, except from a patched encoder, for no position
            terms; a tensor that holds anything else than these distances is outside the allow-list.
        rel_embeddings: (2 * att_span, hidden size); None is right only without relative attention.
        compute: computes calls on the allow-list; None is Hugging Face's attention. It gets the module, the options,
            hidden_states, the queries, attention_mask and rel_embeddings, and returns the context.

    Returns:
        (context, None): context is (B, N, H * D). `original` may return the probabilities in place of None.

    Raises:
        NotImplementedError: the call is outside the allow-list, and options.strict is set.
    """
    if not isinstance(attention_mask, EncoderMask):  # else the encoder has looked already
        refused = refusal(module, hidden_states, query_states, output_attentions, relative_pos)
        if refused is not None or runs_original_code():
            if refused is not None and not runs_original_code():
                _note(refused, options.strict)
            return original(
                module, hidden_states, attention_mask, output_attentions,
                query_states=query_states, relative_pos=relative_pos, rel_embeddings=rel_embeddings,
            )  # fmt: skip
        if relative_pos is None and not anatomy_of(module).counts_distances:
            rel_embeddings = None
    states = hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
    return attend_fused(module, options, *states, compute=compute)


def attend_fused(
    module: AttentionModule,
    options: AttentionOptions,
    hidden_states: Tensor,
    attention_mask: Tensor | EncoderMask | None,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    *,
    compute: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, None]:
    """Run a call that is on the allow-list, as everyone is that a patched encoder hands its mask to.

    Args:
        module: as in `attend`, like every argument here; output_attentions and relative_pos mean nothing any more.
        options: as there.
        hidden_states: as there.
        attention_mask: as there.
        output_attentions: as there.
        query_states: as there.
        relative_pos: as there.
        rel_embeddings: as there.
        compute: as there.
    """
    queries = hidden_states if query_states is None else query_states
    is_closed = isinstance(attention_mask, EncoderMask) and attention_mask.closed
    needs_gradient = hidden_states.requires_grad or queries.requires_grad
    if needs_gradient and (is_closed or not _has_hooks(module)):
        queries = _as_view(queries)
        hidden_states = queries if query_states is None else _as_view(hidden_states)
    context = (compute or _fused)(module, options, hidden_states, queries, attention_mask, rel_embeddings)
    # Somebody may change it in place, and the backward needs it as it is.
    return context if is_closed or not context.requires_grad else context.clone(), None


def _has_hooks(module: AttentionModule) -> bool:
    """Tell whether somebody may keep, or change in place, what goes into a part of a module."""
    return any(part is not None and part._forward_pre_hooks for part in module._modules.values())


def _as_view(states: Tensor) -> Tensor:
    """View states that need a gradient, so that the projections' gradients are summed before others are added.

    A reentrant checkpoint makes its inputs leaves, and autocast casts a leaf once for all products, as if it were a
    weight: gradients would then be summed in the low dtype. Of a view they are summed in the same order and dtype with
    checkpoints of either kind and without.
    """
    if torch.compiler.is_compiling() or not states.requires_grad:
        return states
    return states.view_as(states)


def bind_module(
    module: AttentionModule,
    options: AttentionOptions,
    qkv: tuple[Tensor, Tensor, Tensor],
    rel_embeddings: Tensor | None,
    length: int,
    *,
    rel_key: Callable[[Tensor], tuple[Any, ...] | None] = content_key,
    closed: bool = False,
    prefix_length: int = 0,
) -> Callable[..., Any]:
    """Return `run_attention` with all that belongs to a module: its position tables, scale, dropout and backend.

    Args:
        module: attention module with Hugging Face's attributes.
        options: see `AttentionOptions`.
        qkv: queries, keys and values of a call, (B, H, N, D) each.
        rel_embeddings: as in `attend`.
        length: number of queries, and of keys that have a position.
        rel_key: as in `projected_tables`.
        closed: as there.
        prefix_length: leading keys without a position.
    """
    scale = 1.0 / math.sqrt(qkv[0].shape[-1] * anatomy_of(module).scale_factor(module))

    def prepare(tables: PositionTables) -> Tensor | None:
        return _prepared(*qkv, tables, scale, options)

    tables = projected_tables(
        module, rel_embeddings, length, options.apply, prepare=prepare, rel_key=rel_key, closed=closed
    )
    pos_key, pos_query = cast_for_matmul(tables.pos_key, tables.pos_query)
    position = replace(tables.position, prefix_length=prefix_length) if prefix_length else tables.position
    return partial(
        run_attention, pos_key=pos_key, pos_query=pos_query, position=position, scale=scale,
        dropout_p=module.dropout.p if module.dropout.training else 0.0, backend=options.backend,
        strict=options.strict, prepared=tables.prepared,
    )  # fmt: skip


def _fused(
    module: AttentionModule,
    options: AttentionOptions,
    hidden_states: Tensor,
    queries: Tensor,
    attention_mask: Tensor | EncoderMask | None,
    rel_embeddings: Tensor | None,
) -> Tensor:
    q, k, v = project(module, options, queries, hidden_states)
    length = q.shape[2]
    packing: Packing | None = None
    rel_key: Callable[[Tensor], tuple[Any, ...] | None] = content_key
    closed = False
    if isinstance(attention_mask, EncoderMask):
        carried = attention_mask if attention_mask.source.device == q.device else attention_mask.to(q.device)
        masks, packing, rel_key, closed = carried.masks, carried.packing, carried.rel_key, carried.closed
    else:
        masks = _parse_direct(attention_mask, q.shape[0], module.num_attention_heads, length)
    if packing is not None:
        length = packing.longest if packing.contiguous else packing.shape[1]
    run = bind_module(module, options, (q, k, v), rel_embeddings, length, rel_key=rel_key, closed=closed)
    if packing is None:
        return merge_heads(run(q, k, v, masks=masks))
    return _packed(run, packing, masks, q, k, v)


def _packed(run: Callable[..., Any], packing: Packing, masks: Masks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in packed states, (1, H, rows, D) each; return (1, rows, H * D)."""
    if packing.contiguous:
        real = [x[:, :, : packing.tokens] for x in (q, k, v)]
        context = run(*real, masks=Masks(), cu_seqlens=packing.cu_seqlens, max_seqlen=packing.longest)
        return torch.cat([merge_heads(context), packing.padding_context(merge_heads(v))], dim=1)
    heads = q.shape[1]
    spread = [packing.unpack(merge_heads(x)).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return packing.pack(merge_heads(run(*spread, masks=masks)))


def merge_heads(heads: Tensor) -> Tensor:
    """View (B, H, N, D) over memory laid out (B, N, H, D) as (B, N, H * D)."""
    return heads.transpose(1, 2).flatten(2)


def project(
    module: AttentionModule, options: AttentionOptions, queries: Tensor, hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Project (B, N, hidden size) states into queries, keys and values, (B, H, N, D) each."""
    q, k, v = cast_for_matmul(*anatomy_of(module).project_heads(module, queries, hidden_states, options.apply))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def cast_for_matmul(*tensors: Any) -> Any:
    """Cast tensors of one device, or None, as autocast casts the operands of a matmul.

    A projection that ignores autocast may have left float32.
    """
    given = tensors[0] if tensors[0] is not None else tensors[-1]
    if given is None or given.is_meta or not torch.is_autocast_enabled(given.device.type):
        return tensors  # the meta device has no autocast
    dtype = torch.get_autocast_dtype(given.device.type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _parse_direct(attention_mask: Tensor | None, batch: int, heads: int, length: int) -> Masks:
    """Parse a mask given to an attention module itself, which Hugging Face broadcasts to (B, H, N, N)."""
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask must be a tensor or None, got {type(attention_mask).__name__}.")
        given, full = tuple(attention_mask.shape), (batch, heads, length, length)
        if len(given) > 4 or any(size not in (1, n) for size, n in zip(reversed(given), reversed(full))):
            raise ValueError(
                f"attention_mask must have shape (B, 1, 1, N) or (B, 1 or H, N, N), or broadcast to {full}, got "
                f"{given}; pass mask[:, None, None, :] for a mask of shape (B, N)."
            )
        while attention_mask.dim() < 4:
            attention_mask = attention_mask.unsqueeze(0)
    return parse_huggingface_mask(attention_mask, batch=batch, nq=length, nk=length)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, tables: PositionTables, scale: float, options: AttentionOptions
) -> Tensor | None:
    """Let the backend that will run the call lay out tables that are kept for later calls."""
    pos_key, pos_query = cast_for_matmul(tables.pos_key, tables.pos_query)
    problem = AttentionProblem(q, k, v, pos_key, pos_query, Masks(), tables.position, scale, max_seqlen=q.shape[2])
    return dispatch.prepare(problem, options.backend, strict=options.strict)


def _note(refused: tuple[str, str], strict: bool) -> None:
    if not torch.compiler.is_compiling():
        notices.fallback(*refused, strict)
    elif strict:
        raise NotImplementedError(f"{refused[0]}; {refused[1]}.")
