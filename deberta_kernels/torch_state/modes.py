"""What PyTorch does while a call comes: whether it is plain eager PyTorch, and whether tensors have values.

Questions that look alike differ in what they count:

    counted as               traced  transformed  not plain_eager  needs_operator  not values_exist
    torch.compile                                                                  yes
    a dispatch mode          yes                  yes              yes             yes
    torch.jit tracing        yes                  yes              yes
    transforms of torch.func         yes          yes              yes
    forward-mode AD                               yes              yes
    a function mode                               yes              yes
    a default device                                               yes
    a profiler                                                     yes

While torch.compile traces, `plain_eager` and `needs_operator` say nothing: that has to be asked before. A linear layer
that is taken over is no operator of this package that a profiler would miss, and a default device changes only how
tensors are made. `values_exist` is about the process, `values_readable` about tensors too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from deberta_kernels.torch_state.captures import capturing

__all__ = [
    "dispatch_mode",
    "exporting",
    "forward_mode",
    "function_mode",
    "is_mapped",
    "is_plain_tensor",
    "needs_operator",
    "plain_eager",
    "traced",
    "transformed",
    "values_exist",
    "values_readable",
]

_PLAIN = (Tensor, nn.Parameter)
# Looked up once, since every call of every layer asks.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_profiled = torch._C._autograd._profiler_enabled  # type: ignore[attr-defined]
_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def traced() -> bool:
    """Tell whether tensors hold no values or operators are being recorded; ordinary autograd code cannot run then."""
    return _dispatch_modes() > 0 or _tracing_state() is not None


def dispatch_mode() -> bool:
    """Tell whether a dispatch mode sees operators: a counter, or what makes tensors fake."""
    return _dispatch_modes() > 0


def transformed() -> bool:
    """Tell whether a transform of torch.func (vmap, grad, jvp, functionalize) calls."""
    return _transforms()


def forward_mode() -> bool:
    """Tell whether forward-mode differentiation is on: tensors may carry tangents."""
    return forward_ad._current_level >= 0


def function_mode() -> bool:
    """Tell whether a mode sees every function; that of a default device changes only how tensors are made."""
    if _function_modes() == 0:
        return False  # as nearly always
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def exporting() -> bool:
    """Tell whether torch.export traces, or torch.jit."""
    # Not `is_exporting()` where its flag can be read: the compiler of torch 2.9 takes that function for always true.
    flag = torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()
    return flag or torch.jit.is_tracing()  # type: ignore[attr-defined, no-any-return]


def plain_eager() -> bool:
    """Tell whether no mode, function transform or tracer wants to see PyTorch's own operations."""
    return not (
        _dispatch_modes() > 0
        or (_function_modes() > 0 and function_mode())
        or _transforms()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def needs_operator(tensors: Sequence[Tensor | None]) -> bool:
    """Tell whether somebody needs to see an operator of this package, or its arguments, all on one device, are special.

    Args:
        tensors: the arguments, the first of them not None.
    """
    if (
        _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or _profiled()
        or tensors[0].is_meta  # type: ignore[union-attr]
    ):
        return True
    for x in tensors:  # noqa: SIM110, a generator would be a frame for each tensor
        if x is not None and type(x) not in _PLAIN:
            return True
    return False


def values_exist() -> bool:
    """Tell whether tensors have values: nobody traces them by the compiler, and no mode stands for them."""
    return not torch.compiler.is_compiling() and _dispatch_modes() == 0


def values_readable(*tensors: Tensor) -> bool:
    """Tell whether the values of tensors can be read: of plain ones, outside tracing, transforms and graph captures."""
    if not values_exist() or transformed():
        return False
    for x in tensors:  # noqa: SIM110, as above
        if type(x) not in _PLAIN or x.is_meta or (x.is_cuda and capturing(x.device)):
            return False
    return True


def is_plain_tensor(x: Tensor) -> bool:
    """Tell whether x is a plain tensor: one that a tracer made has no values, and perhaps no device."""
    return type(x) in _PLAIN


def is_mapped(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for many, by `torch.vmap` or `is_grads_batched`, or for none: it has no values."""
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return batched or transformed() or type(tensor) not in _PLAIN
