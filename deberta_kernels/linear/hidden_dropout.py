"""Dropout of hidden states and the residual that follows: on the CPU in one pass of the native library.

PyTorch draws a float for each element, one after the other, and keeps the result for the backward. Here draws are
counted (see `deberta_kernels.dropout`), so the backward makes them again. A dropout module is taken over only if it is
a plain `nn.Dropout` that nobody watches; everything else is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import native
from deberta_kernels.checks.arguments import storage_fits
from deberta_kernels.dropout import draw_seed, keep_scale, threshold
from deberta_kernels.linear.layers import is_replaced
from deberta_kernels.torch_state.modes import is_mapped, plain_eager
from deberta_kernels.torch_state.onlookers import has_hooks
from deberta_kernels.torch_state.originals import Originals, called

__all__ = ["drop_and_add", "is_dropout"]

_HOME, _FUNCTIONAL = nn.modules.dropout, nn.functional
_ORIGINALS = Originals(
    *called(nn.Dropout, _HOME.__name__, "Dropout.forward"),
    (_HOME, "F", _FUNCTIONAL.__name__, ""),
    (_FUNCTIONAL, "dropout", _FUNCTIONAL.__name__, "dropout"),
    (torch._VF, "dropout", "_VariableFunctionsClass", "dropout"),
)


def drop_and_add(dropout: nn.Module, x: Tensor, residual: Tensor | None = None, strict: bool = False) -> Tensor:
    """Return dropout(x), plus the residual if there is one.

    Args:
        dropout: a module.
        x: any shape.
        residual: that of x, or None; of another dtype, the result has the wider of the two.
        strict: raise where code that somebody replaced keeps a dropout from being taken over.

    Raises:
        NotImplementedError: strict, and code was replaced.
    """
    if _is_plain(dropout, x, residual) and not is_replaced(_ORIGINALS, "a dropout", strict):
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        seed = int(draw_seed("cpu"))
        return _Dropped.apply(x, residual, dropout.p, seed, dtype)  # type: ignore[no-any-return]
    dropped: Tensor = dropout(x)
    return dropped if residual is None else dropped + residual


def replaced_dropout() -> str | None:
    """Return what of PyTorch's dropout somebody replaced, as a clause of a message; None if nobody did."""
    return _ORIGINALS.replaced()


def is_dropout(module: Any) -> bool:
    """Tell whether a module computes `nn.functional.dropout` and nothing else."""
    return type(module) is nn.Dropout and replaced_dropout() is None


def _is_plain(dropout: Any, x: Tensor, residual: Tensor | None) -> bool:
    if type(dropout) is not nn.Dropout or not dropout.training or not isinstance(dropout.p, float):
        return False
    if torch.compiler.is_compiling() or has_hooks(dropout) or not plain_eager():
        return False
    if not 0 < dropout.p < 1 or dropout.inplace:
        return False
    if residual is not None and (residual.shape != x.shape or not _is_supported(residual)):
        return False
    return _is_supported(x) and native.opened() is not None


def _is_supported(x: Tensor) -> bool:
    strided = type(x) is Tensor and x.layout == torch.strided
    return strided and x.device.type == "cpu" and x.dtype in native.DTYPES and x.numel() > 0 and storage_fits(x)


class _Dropped(torch.autograd.Function):
    """A dropout whose backward makes the same draws; that is a dropout as well, and differentiable in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, p: float, seed: int, dtype: torch.dtype) -> Tensor:
        ctx.draws = p, seed
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, None if residual is None else residual.dtype)
        return _drop(x, residual, p, seed, dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = dresidual = None
        if ctx.needs_input_grad[0]:
            p, seed = ctx.draws
            if not is_mapped(dout):
                dx = _Dropped.apply(dout, None, p, seed, ctx.dtypes[0])
            else:  # many gradients at once
                ones = torch.ones(ctx.shape, dtype=torch.float32, device="cpu")
                dx = (dout * _drop(ones, None, p, seed, torch.float32)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dresidual = dout.to(ctx.dtypes[1])
        return dx, dresidual, None, None, None


def _drop(x: Tensor, residual: Tensor | None, p: float, seed: int, dtype: torch.dtype) -> Tensor:
    library = native.need()
    x = _plain(x)
    if residual is not None:
        residual = _plain(residual)
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    params = native.DropoutParams(
        abi_version=native.ABI_VERSION, count=x.numel(), threads=library.threads(), x_dtype=native.DTYPES[x.dtype],
        residual_dtype=native.DTYPES[x.dtype if residual is None else residual.dtype], out_dtype=native.DTYPES[dtype],
        x=x.data_ptr(), residual=0 if residual is None else residual.data_ptr(), out=out.data_ptr(),
        threshold=threshold(p), seed=seed, scale=keep_scale(p),
    )  # fmt: skip
    library.call("dk_cpu_dropout", params)
    return out


def _plain(x: Tensor) -> Tensor:
    """Return the values as memory that can be read: zeros may have none, and signs may be pending."""
    return x.clone().contiguous() if x._is_zerotensor() else x.resolve_neg().contiguous()
