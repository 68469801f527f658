"""The states of one layer packed and unpacked, with the gradient of every padded row its own.

In a packed batch one row stands for all padding of a sample. Their values are the same, but not their gradients where
a loss reads padded rows. Let x be such a row of the layer's input, y of its output, and g(y) the gradients that come
back to the padded rows of one sample:

    g(x)_i = A^T g(y)_i + c        A: how a row depends on itself beside attention, the same for all of them
                                   c: through the values, to which every padded row contributes the same

The packed row receives the sum over i, hence its share of that is the mean, and what is missing is A^T (g(y)_i - mean).
A loss that reads no padding, or reads all of it alike, has no such deviation, and nothing is done then.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.models.anatomy import anatomy_of
from deberta_kernels.models.packing import Packing
from deberta_kernels.torch_state.modes import is_mapped

__all__ = ["PackedLayer"]


class PackedLayer:
    """One layer of a packed encoder, as the gradients of its padded rows need it.

    Args:
        layer: Hugging Face's layer: attention, intermediate and output.
        packing: how the states are packed.
        before: the layer before; None for the first.
    """

    def __init__(self, layer: Any, packing: Packing, before: PackedLayer | None) -> None:
        self.layer = layer
        self.packing = packing
        self.after: weakref.ref[PackedLayer] | None = None
        self.states: weakref.ref[Tensor] | None = None
        self.deviation: Tensor | None = None  # (1, padded positions, C), of the gradients of the output
        if before is not None:
            before.after = weakref.ref(self)

    def pack(self, padded: Tensor) -> Tensor:
        """Return the rows of the layer's input, (B, N, C), as (1, rows, C)."""
        return _Pack.apply(padded, self)  # type: ignore[no-any-return]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the layer's output, (1, rows, C), as (B, N, C)."""
        padded: Tensor = _Unpack.apply(packed, self)
        self.states = weakref.ref(padded)
        return padded

    def may_deviate(self, gradient: Tensor) -> bool:
        """Tell whether it takes a look at the gradient of the output: on other devices than the CPU that waits."""
        after = None if self.after is None else self.after()
        is_last = self.after is None
        is_kept = self.states is not None and self.states() is not None
        comes_deviating = after is not None and after.deviation is not None
        return gradient.device.type == "cpu" or is_last or is_kept or comes_deviating

    def pull_back(self, rows: Tensor, deviation: Tensor) -> Tensor:
        """Return A^T deviation: (1, padded positions, C), from the packed input of the layer, (1, rows, C)."""
        packing, layer = self.packing, self.layer
        number, differentiable = packing.row_of_padding(), torch.is_grad_enabled()
        devices = [] if rows.device.type == "cpu" else [rows.device]
        with torch.random.fork_rng(devices), torch.enable_grad():
            with torch.no_grad():
                attention = layer.attention.self
                values = anatomy_of(attention).project_heads(attention, rows, rows, _call)[2].flatten(2)
                context = packing.padding_context(values).index_select(1, number - packing.tokens)
            x = rows.detach().index_select(1, number).requires_grad_()
            attended = layer.attention.output(context, x)
            y = layer.output(layer.intermediate(attended), attended)
            return torch.autograd.grad(y, x, deviation.to(y.dtype), create_graph=differentiable)[0]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


class _Pack(torch.autograd.Function):
    """Packing, whose backward gives every padded row its share of the one gradient, and what its own deviates."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, layer: PackedLayer) -> Tensor:
        rows = layer.packing.pack(padded)
        ctx.layer = layer
        ctx.save_for_backward(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layer, (rows,) = ctx.layer, ctx.saved_tensors
        padded = layer.packing.unpack(layer.packing.divide_padding(gradient))
        if layer.deviation is not None:
            pulled = layer.pull_back(rows, layer.deviation).to(padded.dtype)
            flat = padded.reshape(-1, padded.shape[-1])
            places = layer.packing.padding()
            padded = flat.index_copy(0, places, flat.index_select(0, places) + pulled[0]).reshape(padded.shape)
        return padded, None


class _Unpack(torch.autograd.Function):
    """Unpacking, whose backward sums what comes back to all that one row stands for, and keeps what these deviate."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, layer: PackedLayer) -> Tensor:
        ctx.layer = layer
        return layer.packing.unpack(packed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layer, packing = ctx.layer, ctx.layer.packing
        summed = packing.sum_padding(gradient)
        layer.deviation = None
        if layer.may_deviate(gradient):
            number = packing.row_of_padding()
            of_padding = gradient.reshape(-1, gradient.shape[-1]).index_select(0, packing.padding()).unsqueeze(0)
            differs = (of_padding != packing.pack(gradient).index_select(1, number)).any(-1)[0]
            if is_mapped(gradient) or bool(differs.any()):
                # Exactly zero where a sample's own rows agree, whatever those of another hold.
                counts = packing.sum_of_padding(differs.float()[:, None])[:, 0]
                deviation = of_padding - packing.divide_padding(summed).index_select(1, number)
                deviates = (counts > 0).index_select(0, number - packing.tokens)
                layer.deviation = torch.where(deviates[:, None], deviation, 0)
        return summed, None
