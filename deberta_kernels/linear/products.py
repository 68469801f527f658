"""Products with the weight of a linear layer on the CPU, in ways that are faster than PyTorch's on some processors.

The native library: a general library lays out the weight anew for every call, which few tokens do not pay for; and
PyTorch multiplies float32 on x86 with MKL, which keeps its AVX-512 code to processors of its maker. Sums are made in
parts, so that they err no more than MKL's. (oneDNN is as fast with many tokens, but sums 256 and more terms one after
the other, and keeps compiled code for each number of tokens.)

bfloat16 and float16 without instructions for them: PyTorch multiplies a pair at a time then, several times slower than
in float32. Here the operands are widened to float32, which is exact, and the result is rounded once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import env, native
from deberta_kernels.checks.arguments import storage_fits
from deberta_kernels.native.processor import features, vendor
from deberta_kernels.torch_state.modes import is_mapped

__all__ = [
    "anything_gained",
    "lacks_products",
    "natively",
    "natively_with_gradients",
    "suits",
    "suits_gradients",
    "widened",
    "widened_with_gradients",
]

# The native library's variants with vector instructions are faster than PyTorch on some processors, for any number of
# tokens: measured by python -m benchmarks linear.
_UNIT = 16  # the library computes so many outputs at a time


@cache
def lacks_products(dtype: torch.dtype) -> bool:
    """Tell whether PyTorch has no fast products of a narrow dtype on this processor."""
    if vendor() is None:  # not an x86 processor, or not known
        return False
    try:
        if dtype == torch.bfloat16:
            return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):
        return False


def anything_gained() -> bool:
    """Tell whether any dtype has a faster way here than PyTorch's own."""
    if lacks_products(torch.bfloat16) or lacks_products(torch.float16):
        return True
    return _native_wanted() and native.opened() is not None


@cache
def _native_wanted() -> bool:
    """Tell whether the native library's products may be the faster ones: unknown with Intel's MKL and its AMX.

    Decided by what the processor is and not by a clock, so that two runs on one machine give the same bits.
    """
    return vendor() not in (None, "GenuineIntel")


def suits(x: Tensor, weight: Tensor, bias: Tensor | None = None, everywhere: bool = False) -> bool:
    """Tell whether the native library multiplies faster than others do: shapes that fit, as `natively` wants them."""
    if not (everywhere or _native_wanted()) or 0 in weight.shape:  # nothing to multiply
        return False
    if x.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg()):
        return False
    library = native.opened()
    if library is None or library.isa == "generic" or weight.shape[0] % _UNIT:
        return False
    if x.dtype == torch.bfloat16:
        return env.multiplies_bfloat16(library.isa) and "amx_bf16" not in features() and weight.shape[1] % 2 == 0
    return x.dtype == torch.float32


def suits_gradients(weight: Tensor) -> bool:
    """Tell whether `natively_with_gradients` takes the weight too, of a layer that `suits`."""
    return weight.dtype == torch.float32 and weight.shape[1] % _UNIT == 0


def natively(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return x times the transposed weight, plus bias, for what `suits`: (..., in), (out, in) and (out,) of one dtype.

    Memory is what the library sees: nothing is checked here but the number of outputs and the instruction set.
    """
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device="cpu")
    _multiply(x.contiguous(), weight, bias, out, gelu=gelu)
    return out


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gelu: bool = False, transposed: str = ""
) -> None:
    """Write x (tokens, in) times the transposed weight (out, in) plus bias (out,) to out (tokens, out).

    Args:
        x: contiguous, as all are.
        weight: of the dtype of x, as all are.
        bias: or None.
        out: written.
        gelu: the exact GELU of it.
        transposed: names of those given as (in, tokens) and (in, out); float32.
    """
    if out.numel() == 0:
        return
    library = native.need()
    outputs = out.shape[-1]
    tokens = out.numel() // outputs
    params = native.LinearParams(
        abi_version=native.ABI_VERSION, tokens=tokens, in_features=x.numel() // tokens, out_features=outputs,
        dtype=native.DTYPES[x.dtype], gelu=gelu, threads=library.threads(),
        x_transposed="x" in transposed, weight_transposed="weight" in transposed,
        x=x.data_ptr(), weight=weight.data_ptr(), bias=0 if bias is None else bias.data_ptr(), out=out.data_ptr(),
    )  # fmt: skip
    library.call("dk_cpu_linear", params)


def widened(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False) -> Tensor:
    """Return the same, multiplied in float32 and rounded to dtype."""
    with _without_autocast():
        y = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return (torch.ops.aten.gelu_.default(y) if gelu else y).to(dtype)


def _without_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def natively_with_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `natively` of the three, differentiable, for what `suits_gradients`."""
    return _Natively.apply(_aliased(x), _aliased(weight), bias)  # type: ignore[no-any-return]


def widened_with_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `widened` of them, differentiable. Under autocast the gradients of float32 operands are not rounded."""
    return _Widened.apply(_aliased(x), _aliased(weight), bias, dtype)  # type: ignore[no-any-return]


def _aliased(x: Tensor) -> Tensor:
    """Return what the backward may save: a leaf itself would be saved with whatever is put into its `.data` later.

    An alias keeps the memory of the forward, as the transposed weight does that PyTorch saves; it shares the counter of
    changes in place, and a second derivative goes through it.
    """
    return torch.ops.aten.alias.default(x) if x.is_leaf else x


class _Natively(torch.autograd.Function):
    """A native product, backward included; a second derivative goes through PyTorch's own products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        ctx.shapes = x.shape, weight.shape, (*x.shape[:-1], weight.shape[0])
        return natively(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        found = zip((x, weight, dout), ctx.shapes)
        if torch.is_grad_enabled() or not all(t is None or (t.shape == shape and _is_plain(t)) for t, shape in found):
            return _gradients(ctx.needs_input_grad, x, weight, dout)
        rows = dout.reshape(-1, dout.shape[-1]).contiguous()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = rows.new_empty(*dout.shape[:-1], weight.shape[1])
            _multiply(rows, weight.contiguous(), None, dx, transposed="weight")
        if ctx.needs_input_grad[1]:
            dweight = rows.new_empty(rows.shape[1], x.shape[-1])
            _multiply(rows, x.contiguous(), None, dweight, transposed="x weight")
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


class _Widened(torch.autograd.Function):
    """A product in float32, backward included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return widened(x, weight, bias, dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = (None if t is None else t.float() for t in ctx.saved_tensors)
        with _without_autocast():
            gradients = _gradients(ctx.needs_input_grad, x, weight, dout.float())
        return *(None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)), None


def _gradients(
    needs: tuple[bool, ...], x: Tensor | None, weight: Tensor | None, dout: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients by operations that are differentiable, and that a mapping over dout can follow."""
    rows = dout.reshape(-1, dout.shape[-1])
    dx = dout @ weight if needs[0] and weight is not None else None
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] and x is not None else None
    return dx, dweight, rows.sum(0) if needs[2] else None


def _is_plain(x: Tensor) -> bool:
    """Tell whether a tensor that the backward was handed is one whose memory can be read."""
    if is_mapped(x):
        return False
    strided = x.layout == torch.strided and x.device.type == "cpu" and x.dtype == torch.float32
    return strided and not x.is_neg() and storage_fits(x)
