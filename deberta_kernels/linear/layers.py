"""Calls of linear layers: of those that are plain in the fastest way there is for them, of all others as modules.

A module is taken over only if it computes what `nn.Linear` does and nothing could notice: no hooks, no tracing, no
function transform, no replaced code. Everything else (LoRA, quantised layers, parametrisations) is called as a module.
The ways to multiply, and which processor gains by which, are in `products`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels import notices
from deberta_kernels.checks.arguments import storage_fits
from deberta_kernels.linear import products
from deberta_kernels.torch_state.modes import plain_eager
from deberta_kernels.torch_state.onlookers import has_hooks
from deberta_kernels.torch_state.originals import Originals, Place, called, is_own

__all__ = [
    "apply_linear",
    "apply_linear_gelu",
    "is_linear",
    "is_linear_class",
    "is_replaced",
    "register_linear",
]

_NARROW = (torch.bfloat16, torch.float16)
# Other packages' classes of linear layers, (home, name) -> qualified name of the forward, whether a layer is plain.
_registered: dict[tuple[str, str], tuple[str, Callable[[Any], bool]]] = {}
_ACTIVATIONS = "transformers.activations"


def apply_linear(linear: Any, x: Tensor, everywhere: bool = False, strict: bool = False) -> Tensor:
    """Return linear(x), in the fastest way there is if it is a plain layer that nobody watches.

    Args:
        linear: a projection module.
        x: (..., in_features).
        everywhere: use the native library also where PyTorch may be as fast, and in training, backward included.
        strict: raise where code that somebody replaced keeps a layer from being taken over.

    Raises:
        NotImplementedError: strict, and code was replaced.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not is_linear_class(linear):
        return linear(x)  # type: ignore[no-any-return]
    differentiable = torch.is_grad_enabled() and _needs_gradient(linear, x)
    # Nothing is gained in float32 in training unless that is wanted everywhere: most need no look at all then.
    may_gain = everywhere or not (differentiable or linear.training) or _result_dtype(x) in _NARROW
    if may_gain and _fits(linear, x):
        product = _product(linear, x, everywhere, differentiable)
        if product is not None and _is_own(linear, "a linear layer", strict):
            return product(x, linear.weight, linear.bias)
    projected: Tensor = linear(x)
    return projected


def apply_linear_gelu(
    linear: Any, activation: Any, x: Tensor, everywhere: bool = False, strict: bool = False
) -> Tensor:
    """Return activation(linear(x)), in one step if both are plain and the activation is the exact GELU.

    Args:
        linear: a module.
        activation: a module or function.
        x: (..., in_features).
        everywhere: as in `apply_linear`.
        strict: as in `apply_linear`.

    Raises:
        NotImplementedError: as in `apply_linear`.
    """
    # In training the GELU's input is kept, and a checkpoint's first pass, without gradients, must give the same bits.
    takes_over = not linear.training and _is_plain(linear, x) and _is_gelu(activation)
    if not takes_over or (torch.is_grad_enabled() and _needs_gradient(linear, x)):
        return activation(apply_linear(linear, x, everywhere, strict))  # type: ignore[no-any-return]
    if isinstance(activation, nn.Module) and not _is_own(activation, "a GELU", strict):
        return activation(apply_linear(linear, x, everywhere, strict))  # type: ignore[no-any-return]
    product = _product(linear, x, everywhere, differentiable=False)
    if product is not None and _is_own(linear, "a linear layer", strict):
        return product(x, linear.weight, linear.bias, gelu=True)
    projected: Tensor = linear(x)
    # Nobody else has this tensor, unless other code than PyTorch's made it.
    fresh = product is None and _result_dtype(x) == x.dtype and is_linear(linear)
    return _gelu_in_place(projected) if fresh else activation(projected)  # type: ignore[no-any-return]


def _product(linear: Any, x: Tensor, everywhere: bool, differentiable: bool) -> Callable[..., Tensor] | None:
    """Return the fastest product for a plain layer, of x, weight and bias; None where it is the module's own."""
    has_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if has_autocast else x.dtype
    if products.lacks_products(dtype):
        return partial(products.widened_with_gradients if differentiable else products.widened, dtype=dtype)
    # In training a checkpoint's first pass, without gradients, must give the bits of the second, with gradients.
    in_training = differentiable or linear.training
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    if (in_training and not everywhere) or has_autocast:
        return None
    if not products.suits(x, weight, bias, everywhere) or (in_training and not products.suits_gradients(weight)):
        return None
    return products.natively_with_gradients if differentiable else products.natively


def _gelu_in_place(x: Tensor) -> Tensor:
    """Spare the memory of the result: touching fresh memory costs more than the GELU."""
    return torch.ops.aten.gelu_.default(x)  # type: ignore[no-any-return]


def register_linear(home: str, name: str, forward: str, is_plain: Callable[[Any], bool]) -> None:
    """Register another package's subclass of `nn.Linear`, whose layers are linear ones while `is_plain` says so.

    Args:
        home: name of the module that defines the class.
        name: name of the class.
        forward: qualified name, inside `home`, of its forward.
        is_plain: whether a layer computes what `nn.Linear` would with its weight and bias.
    """
    _registered[home, name] = forward, is_plain


def is_linear(module: Any) -> bool:
    """Tell whether a module computes `nn.functional.linear` of its weight and bias, and nothing else."""
    return is_linear_class(module) and _originals_of(type(module)).replaced() is None


def is_linear_class(module: Any) -> bool:
    """Tell whether the class of a module, as it was written, makes it a linear layer."""
    cls = type(module)
    if cls is nn.Linear:
        return True
    found = _registered.get((cls.__module__, cls.__name__))
    return found is not None and found[1](module)


# Class -> the code that a product stands in for, or a GELU: what runs when a module of the class is called.
_originals: dict[type[Any], Originals] = {}


def _originals_of(cls: type[Any]) -> Originals:
    found = _originals.get(cls)
    return _originals.setdefault(cls, Originals(*_places(cls))) if found is None else found


def _is_own(module: nn.Module, what: str, strict: bool) -> bool:
    """Tell whether the code of a module's class is its maker's; as `is_replaced` where it is not."""
    originals = _originals.get(type(module)) or _originals_of(type(module))
    return originals.replaced() is None or not is_replaced(originals, what, strict)


def _places(cls: type[Any]) -> tuple[Place, ...]:
    functional: Any = nn.functional
    if issubclass(cls, nn.Linear):
        home: Any = nn.modules.linear
        own = () if cls is nn.Linear else called(cls, cls.__module__, _registered[cls.__module__, cls.__name__][0])
        function = (functional, "linear", "torch._C._nn", "linear")
        plain = called(nn.Linear, home.__name__, "Linear.forward")
        return (*own, *plain, (home, "F", functional.__name__, ""), function)
    if cls is nn.GELU:
        home = nn.modules.activation
        function = (functional, "gelu", "torch._C._nn", "gelu")
        return (*called(cls, home.__name__, "GELU.forward"), (home, "F", functional.__name__, ""), function)
    return called(cls, _ACTIVATIONS, "GELUActivation.forward")


def is_replaced(originals: Originals, what: str, strict: bool) -> bool:
    """Tell whether somebody replaced code, which then runs: with one warning, or an error if strict."""
    reason = originals.replaced()
    if reason is None:
        return False
    notices.fallback(f"{what} is called as a module: {reason}", "undo that, or pass fast_linears=False", strict)
    return True


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_plain(linear: Any, x: Tensor) -> bool:
    """Tell whether a layer may be taken over."""
    return not torch.compiler.is_compiling() and is_linear_class(linear) and _fits(linear, x)


def _fits(linear: Any, x: Tensor) -> bool:
    """Tell whether dtypes and devices of a linear layer fit for taking it over, and nobody watches."""
    if type(x) is not Tensor or not x.is_cpu or x.numel() == 0 or has_hooks(linear) or not plain_eager():
        return False
    own, parameters = linear.__dict__, linear._parameters
    if "weight" in own or "bias" in own or "bias" not in parameters or parameters.get("weight") is None:
        return False  # pruned, or normalised: what makes its weight is a hook, or code of its own
    weight, bias = parameters["weight"], parameters["bias"]
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return False  # PyTorch broadcasts, or says what is wrong
    # Autocast makes one dtype of these.
    dtypes = (torch.float32, *_NARROW) if torch.is_autocast_enabled("cpu") else (x.dtype,)
    for parameter in (weight,) if bias is None else (weight, bias):
        if type(parameter) is not nn.Parameter or not parameter.is_contiguous() or not parameter.is_cpu:
            return False
        if parameter.dtype not in dtypes or not storage_fits(parameter):  # of memory that was freed PyTorch says so
            return False
    return x.dtype in dtypes and storage_fits(x)


def _needs_gradient(linear: Any, x: Tensor) -> bool:
    return x.requires_grad or any(own is not None and own.requires_grad for own in linear._parameters.values())


def _is_gelu(activation: Any) -> bool:
    """Tell whether an activation, as it was written, is the exact GELU and nothing else."""
    if isinstance(activation, nn.Module):
        cls = type(activation)
        if has_hooks(activation):
            return False
        if cls is nn.GELU:
            return activation.approximate == "none"
        if cls.__module__ != _ACTIVATIONS or cls.__name__ != "GELUActivation":
            return False
        activation = getattr(activation, "act", None)  # the function of the time when it was made
    return is_own(activation, "torch._C._nn", "gelu")
