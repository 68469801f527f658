"""Compute the linear layers of a model with oneDNN, forward and backward, where PyTorch's own way is slower.

PyTorch multiplies float32 matrices on x86 with MKL, and MKL keeps its AVX-512 code to processors of its maker. oneDNN,
which comes with every PyTorch as well, does not. Its operators take the weight as it is, so there is nothing to keep
and nothing to fall out of date; sums are float32 throughout, and a GELU that follows is computed on the way. bfloat16
goes to oneDNN either way, but here without the operators around it and with the GELU before the only rounding.

The operators are private to PyTorch. They are looked up and tried once, and anything unexpected leaves them alone.
A module is taken over only if it computes what `nn.Linear` does and nothing could notice: no hooks, no autocast, no
tracing, no function transform. Everything else (LoRA, quantised layers, parametrisations) is called as a module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from deberta_kernels.processor import features, vendor

__all__ = ["apply_linear", "apply_linear_gelu", "is_hooked", "is_linear", "refusal", "wanted"]

_INTEL = "GenuineIntel"


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
def wanted() -> bool:
    """Tell whether they are the faster ones on this machine: MKL is there, and does not know the processor as its own.

    Decided by the processor's maker and not by a clock, so that two runs on one machine give the same bits.
    """
    return torch.backends.mkl.is_available() and vendor() not in (None, _INTEL) and refusal() is None


def apply_linear(linear: Any, x: Tensor, train: bool = False) -> Tensor:
    """Return linear(x), through oneDNN if it is a plain layer that nobody watches.

    Args:
        linear: a projection module.
        x: (..., in_features).
        train: also where a gradient is wanted, and then in the backward as well.
    """
    differentiable = _needs_gradient(linear, x)
    if ((differentiable or linear.training) and not train) or not _is_plain(linear, x):
        projected: Tensor = linear(x)
        return projected
    if differentiable:
        return _DifferentiableLinear.apply(x, linear.weight, linear.bias)  # type: ignore[no-any-return]
    return _product(x, linear.weight, linear.bias)


def apply_linear_gelu(linear: Any, activation: Any, x: Tensor, train: bool = False) -> Tensor:
    """Return activation(linear(x)), in one step if both are plain and the activation is the exact GELU.

    Args:
        linear: a projection module.
        activation: a module or function.
        x: (..., in_features).
        train: as in `apply_linear`.
    """
    # In training the GELU's input is kept, and a checkpoint's first pass, without gradients, must give the same bits.
    if not linear.training and _is_gelu(activation) and _is_plain(linear, x) and not _needs_gradient(linear, x):
        return _operator()(x, linear.weight, linear.bias, "gelu", [], "none")
    activated: Tensor = activation(apply_linear(linear, x, train))
    return activated


@lru_cache(maxsize=1)
def _operator() -> Callable[..., Tensor]:
    operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return operator


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x times the transposed weight, plus bias: (..., in) and (out, in) to (..., out), of any strides."""
    return _operator()(x, weight, bias, "none", [], "")


class _DifferentiableLinear(torch.autograd.Function):
    """Multiply with oneDNN in the backward as well; a second derivative goes through PyTorch's own products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or not _is_plain_tensor(dout):
            return _gradients_of_modules(ctx.needs_input_grad, x, weight, dout)
        rows = dout.reshape(-1, dout.shape[-1])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _product(dout, weight.t())
        if ctx.needs_input_grad[1]:
            # The first operand laid out anew: oneDNN reads it several times, and the copy is a fiftieth of the product.
            dweight = _product(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t())
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _gradients_of_modules(
    needs: tuple[bool, ...], x: Tensor | None, weight: Tensor | None, dout: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients by operations that are differentiable, and that a mapping over dout can follow."""
    dx = dout @ weight if needs[0] and weight is not None else None
    dweight = None
    if needs[1] and x is not None:
        dweight = dout.reshape(-1, dout.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dx, dweight, dout.reshape(-1, dout.shape[-1]).sum(0) if needs[2] else None


def _is_plain_tensor(x: Tensor) -> bool:
    return type(x) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(x)


def is_linear(module: Any) -> bool:
    """Tell whether a module computes `nn.functional.linear` of its weight and bias, and nothing else.

    AdapterHub makes every linear layer its own. Most never get an adapter, and one that is not active, or merged into
    the weight, changes nothing.
    """
    cls = type(module)
    if cls.__module__ == "adapters.methods.lora" and cls.__name__ in ("LoRALinearTorch", "LoRAMergedLinear"):
        return not module.fan_in_fan_out and (bool(module.merged) or module.get_active_setup() is None)
    return cls is nn.Linear


def _is_plain(linear: Any, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not is_linear(linear) or type(x) is not Tensor:
        return False
    if not _multiplies(x.dtype) or x.device.type != "cpu":
        return False
    for parameter in (linear.weight, linear.bias):
        if parameter is not None and not _is_plain_parameter(parameter, x):
            return False
    if x.numel() == 0 or not torch.backends.mkldnn.enabled or is_hooked(linear):
        return False
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _is_plain_parameter(parameter: Tensor, x: Tensor) -> bool:
    if type(parameter) is not nn.Parameter or not parameter.is_contiguous():
        return False
    return parameter.dtype == x.dtype and parameter.device == x.device


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Tell whether the processor has instructions for products of the dtype."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and "avx512_bf16" in features())


def _needs_gradient(linear: Any, x: Tensor) -> bool:
    if not torch.is_grad_enabled() or not is_linear(linear):
        return False
    tensors = (x, linear.weight, linear.bias)
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _is_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.Module) and is_hooked(activation):
        return False
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    if type(activation).__module__ == "transformers.activations":
        activation = getattr(activation, "act", None)
    return activation is nn.functional.gelu


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a call of the module, or its backward, runs anything but the forward of its class."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(forward or module._backward_hooks or module._backward_pre_hooks) or _has_any_global_hook()
