"""Call the linear layers of a model: those that are plain in the fastest way there is for them, all others as modules.

A module is taken over only if it computes what `nn.Linear` does and nothing could notice: no hooks, no tracing, no
function transform. Everything else (LoRA, quantised layers, parametrisations) is called as a module. The ways to
multiply, and which processor gains by which, are in `products`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from deberta_kernels.modules import products

__all__ = ["apply_linear", "apply_linear_gelu", "is_hooked", "is_linear", "is_watched"]

_NARROW = (torch.bfloat16, torch.float16)
# Somebody may replace these for every module of their class.
_FORWARDS = (nn.Linear.forward, nn.GELU.forward)


def apply_linear(linear: Any, x: Tensor, everywhere: bool = False) -> Tensor:
    """Return linear(x), in the fastest way there is if it is a plain layer that nobody watches.

    Args:
        linear: a projection module.
        x: (..., in_features).
        everywhere: use oneDNN also where PyTorch is as fast, and where a gradient is wanted, backward included.
    """
    if _is_plain(linear, x):
        dtype = _result_dtype(x)
        differentiable = _needs_gradient(linear, x)
        if products.lacks_products(dtype):
            widen = products.widened_with_gradients if differentiable else products.widened
            return widen(x, linear.weight, linear.bias, dtype)
        # In training a checkpoint's first pass, without gradients, must give the bits of the second, with gradients.
        if not (differentiable or linear.training) and _runs_natively(linear, x, everywhere):
            return products.natively(x, linear.weight, linear.bias)
        if _runs_in_onednn(linear, x, everywhere) and (everywhere or not (differentiable or linear.training)):
            multiply = products.in_onednn_with_gradients if differentiable else products.in_onednn
            return multiply(x, linear.weight, linear.bias)
    projected: Tensor = linear(x)
    return projected


def apply_linear_gelu(linear: Any, activation: Any, x: Tensor, everywhere: bool = False) -> Tensor:
    """Return activation(linear(x)), in one step if both are plain and the activation is the exact GELU.

    Args:
        linear: a module.
        activation: a module or function.
        x: (..., in_features).
        everywhere: as in `apply_linear`.
    """
    # In training the GELU's input is kept, and a checkpoint's first pass, without gradients, must give the same bits.
    if not linear.training and _is_gelu(activation) and _is_plain(linear, x) and not _needs_gradient(linear, x):
        dtype = _result_dtype(x)
        if products.lacks_products(dtype):
            return products.widened(x, linear.weight, linear.bias, dtype, gelu=True)
        if _runs_natively(linear, x, everywhere):
            return products.natively(x, linear.weight, linear.bias, gelu=True)
        if _runs_in_onednn(linear, x, everywhere):
            return products.in_onednn(x, linear.weight, linear.bias, gelu=True)
        if dtype == x.dtype:
            projected: Tensor = linear(x)
            return _gelu_in_place(projected)
    activated: Tensor = activation(apply_linear(linear, x, everywhere))
    return activated


def _gelu_in_place(x: Tensor) -> Tensor:
    """Spare the memory of the result: touching fresh memory costs more than the GELU."""
    return torch.ops.aten.gelu_.default(x)  # type: ignore[no-any-return]


def is_linear(module: Any) -> bool:
    """Tell whether a module computes `nn.functional.linear` of its weight and bias, and nothing else.

    AdapterHub makes every linear layer its own. Most never get an adapter, and one that is not active, or merged into
    the weight, changes nothing.
    """
    cls = type(module)
    if cls.__module__ == "adapters.methods.lora" and cls.__name__ in ("LoRALinearTorch", "LoRAMergedLinear"):
        return not module.fan_in_fan_out and (bool(module.merged) or module.get_active_setup() is None)
    return cls is nn.Linear and cls.forward is _FORWARDS[0]


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _runs_in_onednn(linear: Any, x: Tensor, everywhere: bool) -> bool:
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return False
    return products.can_multiply(x.dtype) if everywhere else products.wanted(x.dtype)


def _runs_natively(linear: Any, x: Tensor, everywhere: bool) -> bool:
    return not torch.is_autocast_enabled("cpu") and products.suits_few_tokens(x, linear.weight, linear.bias, everywhere)


def _is_plain(linear: Any, x: Tensor) -> bool:
    """Tell whether the layer may be taken over: dtypes and devices fit, and nobody watches."""
    if torch.compiler.is_compiling() or not is_linear(linear) or type(x) is not Tensor:
        return False
    if x.device.type != "cpu" or x.numel() == 0 or is_hooked(linear):
        return False
    weight, bias = linear.weight, linear.bias
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return False  # PyTorch broadcasts, or says what is wrong
    autocast = torch.is_autocast_enabled("cpu")
    for parameter in (weight, bias):
        if parameter is not None and not _is_plain_parameter(parameter, x, autocast):
            return False
    return not is_watched()


def is_watched() -> bool:
    """Tell whether a mode, a function transform or a tracer wants to see PyTorch's own operations."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or _is_any_function_watched()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _is_any_function_watched() -> bool:
    """Tell whether a mode sees every function; that of a default device changes only how tensors are made."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def _is_plain_parameter(parameter: Tensor, x: Tensor, autocast: bool) -> bool:
    if type(parameter) is not nn.Parameter or not parameter.is_contiguous() or parameter.device != x.device:
        return False
    if autocast:  # which makes one dtype of these
        return all(t.dtype in (torch.float32, *_NARROW) for t in (parameter, x))
    return parameter.dtype == x.dtype


def _needs_gradient(linear: Any, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (x, linear.weight, linear.bias)
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _is_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.Module) and is_hooked(activation):
        return False
    cls = type(activation)
    if cls is nn.GELU:
        return activation.approximate == "none" and cls.forward is _FORWARDS[1]
    if cls.__module__ == "transformers.activations" and cls.forward.__module__ == cls.__module__:
        activation = getattr(activation, "act", None)
    return activation is nn.functional.gelu


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a call of the module, or its backward, runs anything but the forward of its class."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(forward or module._backward_hooks or module._backward_pre_hooks) or _has_any_global_hook()
