"""Multiply by the weight of a linear layer on the CPU, in ways that are faster than PyTorch's own on some processors.

float32: PyTorch multiplies on x86 with MKL, and MKL keeps its AVX-512 code to processors of its maker. oneDNN, which
comes with every PyTorch as well, does not. Its operators take the weight as it is, so there is nothing to keep and
nothing to fall out of date; sums are float32 throughout, and a GELU that follows is computed on the way.

bfloat16, with instructions for it: oneDNN either way, but here without the operators around it and with the GELU before
the only rounding. bfloat16 and float16 without: PyTorch multiplies a pair at a time then, several times slower than in
float32. Here the operands are widened to float32, which is exact, and the result is rounded once.

Few tokens, as in a single text: the native library. A general library lays out the weight anew for every call.

oneDNN's operators are private to PyTorch. They are looked up and tried once, and anything unexpected leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import native
from deberta_kernels.processor import features, vendor

__all__ = [
    "anything_gained",
    "can_multiply",
    "in_onednn",
    "in_onednn_with_gradients",
    "lacks_products",
    "natively",
    "refusal",
    "suits_few_tokens",
    "wanted",
    "widened",
    "widened_with_gradients",
]

_INTEL = "GenuineIntel"

# Numbers of tokens for which these variants of the native library are faster than oneDNN and MKL, measured by
# benchmarks/bench_linear.py.
_VARIANTS = ("avx2", "avx512", "avx512_bf16")
_FEWEST, _MOST = 8, 192


@cache
def refusal() -> str | None:
    """Return why oneDNN's linear operators cannot be used here, or None when they can."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        x, weight, bias = torch.ones(2, 3), torch.full((4, 3), 0.5), torch.ones(4)
        for activation, algorithm in (("none", ""), ("gelu", "none")):
            expected = nn.functional.linear(x, weight, bias)
            expected = nn.functional.gelu(expected) if activation == "gelu" else expected
            actual = operator(x, weight, bias, activation, [], algorithm)
            if not torch.allclose(actual, expected, rtol=1e-6, atol=1e-6):
                return "oneDNN's linear operator of this PyTorch computes something else"
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this PyTorch's oneDNN has no such linear operator ({type(error).__name__})"
    return None


@cache
def wanted(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies faster than PyTorch on this machine: MKL is there, but its AVX-512 code is not.

    Decided by what the processor is and not by a clock, so that two runs on one machine give the same bits. With AVX2
    the two are equal, and the gradients are faster in MKL.
    """
    if not torch.backends.mkl.is_available() or vendor() in (None, _INTEL) or "avx512f" not in features():
        return False
    return can_multiply(dtype) and refusal() is None


@cache
def can_multiply(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has fast products of the dtype on this processor."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and "avx512_bf16" in features())


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
    narrow = (torch.bfloat16, torch.float16)
    if wanted(torch.float32) or any(wanted(dtype) or lacks_products(dtype) for dtype in narrow):
        return True
    return _native_wanted() and native.opened() is not None


@cache
def _native_wanted() -> bool:
    """Tell whether the native library's products may be the faster ones: unknown with Intel's MKL and its AMX."""
    return vendor() not in (None, _INTEL)


def suits_few_tokens(x: Tensor, weight: Tensor, bias: Tensor | None = None, everywhere: bool = False) -> bool:
    """Tell whether the native library multiplies faster than others do: shapes that fit, as `natively` wants them."""
    if not (everywhere or _native_wanted()) or not x.is_contiguous():
        return False
    if any(tensor is not None and tensor.is_neg() for tensor in (x, weight, bias)):
        return False
    library, tokens = native.opened(), x.numel() // weight.shape[1]
    if library is None or library.isa not in _VARIANTS or weight.shape[0] % 16 or not _FEWEST <= tokens <= _MOST:
        return False
    if x.dtype == torch.bfloat16:
        return library.isa == "avx512_bf16" and "amx_bf16" not in features() and weight.shape[1] % 2 == 0
    return x.dtype == torch.float32


def natively(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return the same as `in_onednn` for what `suits_few_tokens`: (..., in), (out, in) and (out,) of one dtype.

    Memory is what the library sees: nothing is checked here but the number of outputs and the instruction set.
    """
    library = native.need()
    outputs, inputs = weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device="cpu")
    params = native.LINEAR_PARAMS.pack(
        native.ABI_VERSION, x.numel() // inputs, inputs, outputs, native.DTYPES[x.dtype], gelu, library.threads(),
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    library.call("dk_cpu_linear", params)
    return out


@lru_cache(maxsize=1)
def _operator() -> Callable[..., Tensor]:
    operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return operator


def in_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return x times the transposed weight, plus bias: (..., in) and (out, in) to (..., out), of any strides."""
    return _operator()(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def widened(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False) -> Tensor:
    """Return the same, multiplied in float32 and rounded to dtype."""
    with _without_autocast():
        y = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return (torch.ops.aten.gelu_.default(y) if gelu else y).to(dtype)


def _without_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def in_onednn_with_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `in_onednn` of the three, differentiable."""
    return _InOneDNN.apply(x, weight, bias)  # type: ignore[no-any-return]


def widened_with_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `widened` of them, differentiable. Under autocast the gradients of float32 operands are not rounded."""
    return _Widened.apply(x, weight, bias, dtype)  # type: ignore[no-any-return]


class _InOneDNN(torch.autograd.Function):
    """Multiply with oneDNN in the backward as well; a second derivative goes through PyTorch's own products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        return in_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or not _is_plain(dout):
            return _gradients(ctx.needs_input_grad, x, weight, dout)
        rows = dout.reshape(-1, dout.shape[-1])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = in_onednn(dout, weight.t())
        if ctx.needs_input_grad[1]:
            # The first operand laid out anew: oneDNN reads it several times, and the copy is a fiftieth of the product.
            dweight = in_onednn(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t())
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


class _Widened(torch.autograd.Function):
    """Multiply in float32 in the backward as well."""

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
    return type(x) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(x)
