"""What a user chose for patched models, one by one or all; linear layers and dropouts are called accordingly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear

__all__ = ["AttentionOptions", "choose_for_all", "chosen_for_all", "options_of"]


@dataclass(frozen=True)
class AttentionOptions:
    """The choices for a patched model.

    Attributes:
        backend: "auto" or the name of a backend, which then never falls back to another one.
        strict: raise NotImplementedError where the original code would run, or a slower backend than the device could.
        unpad: "auto": encoders leave out padding where that pays; True: wherever they can; False: never.
        fast_linears: compute plain linear layers on the CPU in faster ways: False, "auto" or True; see `products`.
    """

    backend: str = "auto"
    strict: bool = False
    unpad: str | bool = "auto"
    fast_linears: str | bool = "auto"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The first pickles were made without fast linear layers, and without a name for that.
        self.__dict__.update({"fast_linears": False, **state})

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a linear layer or a dropout."""
        if not self.fast_linears:
            return layer(x)  # type: ignore[no-any-return]
        if isinstance(layer, nn.Dropout):
            return drop_and_add(layer, x, strict=self.strict)
        return apply_linear(layer, x, everywhere=self.fast_linears is True, strict=self.strict)


# For modules that keep their class because the forward of the class was replaced; None while none is.
_for_all: AttentionOptions | None = None
# For a module whose options were taken away while it was called.
_PLAIN = AttentionOptions(fast_linears=False)


def choose_for_all(options: AttentionOptions | None) -> None:
    """Set the options of `patch_all`; None: it was undone."""
    global _for_all
    _for_all = options


def chosen_for_all() -> AttentionOptions | None:
    """Return the options of `patch_all`; None while it is not in force."""
    return _for_all


def options_of(module: nn.Module) -> AttentionOptions:
    """Return the options of a module: its own, or else those for all."""
    options: AttentionOptions = getattr(module, "patch_options", None) or _for_all or _PLAIN
    return options
