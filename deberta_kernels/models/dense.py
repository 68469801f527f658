"""Run the layers around attention in the fastest way, in patched models: linear ones and the dropout behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import dispatch
from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from deberta_kernels.models.guards.known import ADAPTERHUB, ADAPTERHUB_ONE, MODELING, MODELING_ONE, Known
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.swap import Swapped, base_class, original_forward, swap, undo
from deberta_kernels.torch_state.tracing import answered_once, traces_questions

__all__ = ["KNOWN_DENSE", "fuse_dense", "stand_in"]


class FusedIntermediate(Swapped):
    """Mix a fast linear layer and GELU into the first half of a feed-forward block."""

    dense: nn.Linear
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Widen (..., hidden size) to (..., intermediate size)."""
        if _is_changed(self):
            return _original(self)(self, hidden_states)  # type: ignore[no-any-return]
        return apply_linear_gelu(self.dense, self.intermediate_act_fn, hidden_states, *_chosen(self))


class FusedOutput(Swapped):
    """Mix a fast linear layer into what follows attention, or ends a feed-forward block."""

    dense: nn.Linear
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Project hidden_states and add them to input_tensor, both (..., hidden size) when done."""
        if _is_changed(self):
            return _original(self)(self, hidden_states, input_tensor)  # type: ignore[no-any-return]
        projected = apply_linear(self.dense, hidden_states, *_chosen(self))
        dropped = drop_and_add(self.dropout, projected, input_tensor, strict=_chosen(self)[1])
        normalised: Tensor = self.LayerNorm(dropped)
        return normalised


class FusedAdapterOutput(Swapped):
    """Mix a fast linear layer into AdapterHub's modules of that place, which go on with bottleneck adapters."""

    dense: nn.Linear
    dropout: nn.Module
    LayerNorm: nn.Module
    bottleneck_layer_forward: Callable[[Tensor, Tensor, nn.Module], Tensor]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Project hidden_states, run the adapters, and add input_tensor; see `FusedOutput`."""
        if _is_changed(self):
            return _original(self)(self, hidden_states, input_tensor)  # type: ignore[no-any-return]
        projected = apply_linear(self.dense, hidden_states, *_chosen(self))
        projected = drop_and_add(self.dropout, projected, strict=_chosen(self)[1])
        return self.bottleneck_layer_forward(projected, input_tensor, self.LayerNorm)


# For modules that keep their class because the forward of the class was replaced.
_stand_ins = False, False


def stand_in(options: AttentionOptions) -> None:
    """Set the options of the stand-ins for whole classes; they are put in place elsewhere."""
    global _stand_ins
    _stand_ins = options.fast_linears is True, options.strict


def _chosen(module: Any) -> tuple[bool, bool]:
    """Return `everywhere` and `strict` of `apply_linear`."""
    options: AttentionOptions | None = getattr(module, "swap_options", None)
    return _stand_ins if options is None else (options.fast_linears is True, options.strict)


def _is_changed(module: Any) -> bool:
    """Tell whether somebody replaced the code that a module's own class had; note it, or raise where it is strict."""
    changed = _changed(module)
    if changed is not None and not torch.compiler.is_compiling():
        dispatch.fallback(changed, "only the code of transformers and AdapterHub is fused", _chosen(module)[1])
    return changed is not None


# Class -> its forward and the code of that, as they were found to be its own.
_own_forwards: dict[type[nn.Module], tuple[Any, Any]] = {}


def _changed(module: Any) -> str | None:
    if traces_questions() or not isinstance(module, Swapped):
        return None  # a stand-in runs, so it is what the class has
    return _look_at(module)


@answered_once
def _look_at(module: Any) -> str | None:
    part: Any = module
    base = base_class(part)
    forward = base.forward
    if _own_forwards.get(base) != (forward, getattr(forward, "__code__", None)):
        changed = _MIXINS[base.__name__][0].changed(part)
        if changed is not None:
            return changed
        _own_forwards[base] = forward, forward.__code__
    return None


def _original(module: Any) -> Callable[..., Any]:
    return original_forward(type(module))


def _known(home: str, name: str, mixin: Any) -> Known:
    @functools.wraps(mixin.forward)
    def replacement(self: Any, *arguments: Tensor, **named: Tensor) -> Any:
        return mixin.forward(self, *arguments, **named)

    return Known(home, name, replacement)


_MIXINS: dict[str, tuple[Known, type[Swapped]]] = {
    name: (_known(home, name, mixin), mixin)
    for home, name, mixin in (
        (MODELING, "DebertaV2Intermediate", FusedIntermediate),
        (MODELING, "DebertaV2Output", FusedOutput),
        (MODELING, "DebertaV2SelfOutput", FusedOutput),
        (MODELING_ONE, "DebertaIntermediate", FusedIntermediate),
        (MODELING_ONE, "DebertaOutput", FusedOutput),
        (MODELING_ONE, "DebertaSelfOutput", FusedOutput),
        (ADAPTERHUB, "DebertaV2OutputWithAdapters", FusedAdapterOutput),
        (ADAPTERHUB, "DebertaV2SelfOutputWithAdapters", FusedAdapterOutput),
        (ADAPTERHUB_ONE, "DebertaOutputWithAdapters", FusedAdapterOutput),
        (ADAPTERHUB_ONE, "DebertaSelfOutputWithAdapters", FusedAdapterOutput),
    )
}
KNOWN_DENSE = tuple(known for known, _ in _MIXINS.values())


def fuse_dense(encoder: nn.Module, options: AttentionOptions) -> None:
    """Let the linear layers around the attention of an encoder run as the options say."""
    for module, mixin in _dense_blocks(encoder):
        if options.fast_linears:
            swap(module, mixin, options)
        else:
            undo(module)


def _dense_blocks(encoder: nn.Module) -> Iterator[tuple[nn.Module, type[Swapped]]]:
    for module in encoder.modules():
        known, mixin = _MIXINS.get(base_class(module).__name__, (None, Swapped))
        if known is not None and known.refusal(module) is None:
            yield module, mixin
