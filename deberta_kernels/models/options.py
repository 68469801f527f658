"""Say what a user chose for a patched model, and call its linear layers and dropouts accordingly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear

__all__ = ["AttentionOptions"]


@dataclass(frozen=True)
class AttentionOptions:
    """Hold what a user chose for a patched model.

    Attributes:
        backend: "auto" or the name of a backend, which then never falls back to another one.
        strict: raise NotImplementedError where the original code would run, or a slower backend than the device could.
        unpad: "auto": encoders leave out padding where that pays; True: wherever they can; False: never.
        fast_linears: compute plain linear layers on the CPU in faster ways: False, "auto" or True; see `products`.
    """

    backend: str = "auto"
    strict: bool = False
    unpad: str | bool = "auto"
    fast_linears: str | bool = False

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a linear layer or a dropout."""
        if not self.fast_linears:
            return layer(x)  # type: ignore[no-any-return]
        if isinstance(layer, nn.Dropout):
            return drop_and_add(layer, x, strict=self.strict)
        return apply_linear(layer, x, everywhere=self.fast_linears is True, strict=self.strict)
