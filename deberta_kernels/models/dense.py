"""The layers around attention in patched models, in the fastest way: linear ones and the dropout behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import notices
from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from deberta_kernels.models.anatomy import VERSION_ONE, VERSION_TWO
from deberta_kernels.models.options import AttentionOptions, options_of
from deberta_kernels.models.patched_class import Patched, base_class, original_forward, patch_class, restore_class
from deberta_kernels.models.registry import REMEDY, Kind, ModuleClass, register, rows
from deberta_kernels.torch_state.tracing import answered_once, traces_questions

__all__ = ["FusedIntermediate", "FusedOutput", "fuse_dense", "original_if_changed"]


class FusedIntermediate(Patched):
    """A fast linear layer and GELU, to be mixed into the first half of a feed-forward block."""

    dense: nn.Linear
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Widen (..., hidden size) to (..., intermediate size)."""
        options = options_of(self)  # type: ignore[arg-type]
        original = original_if_changed(self, options)
        if original is not None:
            return original(self, hidden_states)  # type: ignore[no-any-return]
        everywhere = options.fast_linears is True
        return apply_linear_gelu(self.dense, self.intermediate_act_fn, hidden_states, everywhere, options.strict)


class FusedOutput(Patched):
    """A fast linear layer, to be mixed into what follows attention or ends a feed-forward block."""

    dense: nn.Linear
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Project hidden_states and add them to input_tensor, both (..., hidden size) when done."""
        options = options_of(self)  # type: ignore[arg-type]
        original = original_if_changed(self, options)
        if original is not None:
            return original(self, hidden_states, input_tensor)  # type: ignore[no-any-return]
        projected = apply_linear(self.dense, hidden_states, options.fast_linears is True, options.strict)
        dropped = drop_and_add(self.dropout, projected, input_tensor, strict=options.strict)
        normalised: Tensor = self.LayerNorm(dropped)
        return normalised


def original_if_changed(module: Any, options: AttentionOptions) -> Callable[..., Any] | None:
    """Return the original forward, unbound, if somebody replaced the code of a module's class; None if nobody did.

    That is noted, or an error where the options are strict.
    """
    if traces_questions() or not isinstance(module, Patched):
        return None  # a replaced forward runs, so it is what the class has
    changed, cls = _look_at(module), type(module)
    if changed is None:
        return None
    if not torch.compiler.is_compiling():
        notices.fallback(changed, REMEDY, options.strict)
    return original_forward(cls)  # type: ignore[arg-type]


# Class -> its forward and the code of that, as they were found to be its own.
_own_forwards: dict[type[nn.Module], tuple[Any, Any]] = {}


@answered_once
def _look_at(module: Any) -> str | None:
    part: Any = module
    base = base_class(part)
    forward = base.forward
    if _own_forwards.get(base) != (forward, getattr(forward, "__code__", None)):
        row = _row(base.__name__)
        changed = None if row is None else row.changed(part)
        if changed is not None:
            return changed
        _own_forwards[base] = forward, forward.__code__
    return None


register(
    *(
        ModuleClass(kind, version, version.home, f"{prefix}{name}", mixin)
        for version, prefix in ((VERSION_TWO, "DebertaV2"), (VERSION_ONE, "Deberta"))
        for kind, name, mixin in (
            (Kind.INTERMEDIATE, "Intermediate", FusedIntermediate),
            (Kind.OUTPUT, "Output", FusedOutput),
            (Kind.OUTPUT, "SelfOutput", FusedOutput),
        )
    )
)


@cache
def _row(name: str) -> ModuleClass | None:
    """Return the row of the class of a name: subclasses are other classes here."""
    return next((row for row in rows(Kind.INTERMEDIATE, Kind.OUTPUT) if row.name == name), None)


def fuse_dense(encoder: nn.Module, options: AttentionOptions) -> None:
    """Let the linear layers around the attention of an encoder run as the options say."""
    for module in encoder.modules():
        row = _row(base_class(module).__name__)
        if row is None or row.refusal(module) is not None:
            continue
        if options.fast_linears:
            patch_class(module, row.mixin, options)
        else:
            restore_class(module)
