"""The allow-list of attention calls: which may run in the kernels, and why the others run the original code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.linear.hidden_dropout import replaced_dropout
from deberta_kernels.models.anatomy import TALKING_HEADS, AttentionModule, anatomy_of, mixes_heads
from deberta_kernels.models.guards.distances import are_ordinary
from deberta_kernels.position import attention_span
from deberta_kernels.torch_state.modes import exporting, forward_mode, function_mode, transformed
from deberta_kernels.torch_state.onlookers import has_forward_hooks, is_watched, sees_every_call

__all__ = ["refusal", "refusal_everywhere", "refusal_of", "runs_original_code"]


def runs_original_code() -> bool:
    """Tell whether a tracer or a function transform is at work that wants plain PyTorch operations.

    That is torch.jit tracing, torch.export, the transforms of torch.func, and forward-mode differentiation. The
    original code is what was asked for then, so nobody is warned.
    """
    if exporting():
        return True
    return not torch.compiler.is_compiling() and (transformed() or forward_mode())


def refusal(
    module: AttentionModule,
    hidden_states: Tensor,
    query_states: Tensor | None,
    output_attentions: bool,
    relative_pos: Tensor | None,
) -> tuple[str, str] | None:
    """Return why no kernel may run a call, and what the user can change; None when one may."""
    if output_attentions:
        return ("attention probabilities were asked for", "leave output_attentions=False where they are not needed")
    if query_states is not None and not anatomy_of(module).takes_queries:
        return ("query_states were given to DeBERTa v1", "pass none")
    if hidden_states.dim() != 3:
        return (
            f"hidden_states has {hidden_states.dim()} dimensions",
            "pass hidden_states of shape (B, N, hidden size)",
        )
    if query_states is not None and query_states.shape != hidden_states.shape:
        return (
            "query_states and hidden_states differ in shape",
            "pass query_states of the shape of hidden_states, or none",
        )
    positioned = module.relative_attention and anatomy_of(module).scale_factor(module) > 1
    if positioned and relative_pos is not None and not are_ordinary(relative_pos, module, hidden_states.shape[1]):
        return (
            "a relative_pos tensor was given that holds other values than the distances between the tokens",
            "pass none for ordinary distances",
        )
    return refusal_of(module) or refusal_everywhere()


def refusal_of(module: AttentionModule) -> tuple[str, str] | None:
    """Return why no kernel may run any call of a module, and what the user can change; None when one may."""
    if mixes_heads(module):
        return TALKING_HEADS
    anatomy = anatomy_of(module)
    if module.relative_attention and anatomy.scale_factor(module) > 1:
        buckets, most = anatomy.position_numbers(module)
        if buckets == 1:
            return ("the model has one position bucket", "train it with at least two")
        span = attention_span(buckets, most)
        if getattr(module, "pos_ebd_size", span) != span:
            return ("pos_ebd_size of an attention module is not what its other settings make it", "set them together")
    dropout: Any = module._modules.get("dropout")
    if type(dropout) is not nn.Dropout or dropout.p >= 1.0:
        return (
            "the attention dropout is not an nn.Dropout with a probability below 1",
            f"it is {type(dropout).__name__}; nn.Dropout(0.0) switches it off",
        )
    if has_forward_hooks(dropout) or (not torch.compiler.is_compiling() and is_watched(dropout)):
        return (
            "a hook on the attention dropout wants the attention probabilities",
            "remove the hook where they are not needed",
        )
    return None


def refusal_everywhere() -> tuple[str, str] | None:
    """Return why no kernel may run any call of any module now, and what the user can change; None when one may."""
    if torch.compiler.is_compiling():
        return None
    if function_mode():
        return ("a TorchFunctionMode sees PyTorch's functions", "leave the mode for calls that may be fused")
    seen = sees_every_call() or replaced_dropout()
    return None if seen is None else (seen, "undo that for calls that may be fused")
