"""Launches of kernels that Triton has launched in the same form before, past its binder.

The binder takes longer than a kernel of a short text: it asks every argument by itself what a kernel was compiled for.
All that decides here, by the kernels' own declarations: dtypes, which pointers lie on 16 bytes, the constants, and
whether numbers are of 32 bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deberta_kernels.impl.triton.plan import Launch

__all__ = ["form_of", "is_watched", "launched", "remember"]

_INT32 = 2**31
# Forms are few: dtypes, features, and pointers that lie on 16 bytes or not. Somebody who makes more starts anew.
_MOST_FORMS = 4096


class _Parameters(NamedTuple):
    """What the parameters of a kernel are.

    Attributes:
        pointers: names of the tensors.
        aligned: of those, the ones that a kernel is compiled for on 16 bytes, or not.
        integers: names of the numbers whose size is that of their value.
    """

    pointers: tuple[str, ...]
    aligned: tuple[str, ...]
    integers: tuple[str, ...]


_parameters: dict[Any, _Parameters | None] = {}
_compiled: dict[Hashable, Any] = {}


def form_of(launch: Launch) -> Hashable | None:
    """Return what a kernel is compiled for in this launch; None where Triton must be asked."""
    kernel, given = launch.kernel, launch.arguments
    function = kernel.fn  # the kernel computes its hash of its source, each time
    if function not in _parameters:
        _parameters[function] = _read(launch)
    parameters = _parameters[function]
    if parameters is None or is_watched(kernel):
        return None
    numbers = [given[name] for name in parameters.integers]
    if not (min(numbers, default=0) >= -_INT32 and max(numbers, default=0) < _INT32):
        return None
    return (
        function, driver.active.get_current_device(), launch.num_warps, launch.num_stages, *launch.constants.values(),
        knobs.runtime.debug, knobs.runtime.add_stages_inspection_hook,
        *[given[name].dtype for name in parameters.pointers],
        *[given[name].data_ptr() % 16 == 0 for name in parameters.aligned],
    )  # fmt: skip


def _read(launch: Launch) -> _Parameters | None:
    """Return what the parameters of a kernel are, of one of its launches."""
    if torch.version.hip is not None or not isinstance(launch.kernel, JITFunction):
        return None  # for AMD's devices a kernel is compiled for the size of its tensors too; nothing is interpreted
    pointers, aligned, integers = [], [], []
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name)
        if isinstance(value, Tensor):
            pointers.append(parameter.name)
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                aligned.append(parameter.name)
        elif isinstance(value, int):
            if not parameter.do_not_specialize:
                return None
            if not parameter.annotation_type:
                integers.append(parameter.name)
    return _Parameters(tuple(pointers), tuple(aligned), tuple(integers))


def is_watched(*kernels: Any) -> bool:
    """Tell whether somebody follows launches; Triton knows what to tell them."""
    if knobs.compilation.instrumentation_mode:
        return True
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    for kernel in kernels:  # noqa: SIM110, a generator would be a frame for each kernel
        if kernel.pre_run_hooks:
            return True
    return False


def launched(launch: Launch, form: Hashable) -> Any:
    """Launch a kernel that was launched in this form before, and return it compiled; None where none was."""
    compiled = _compiled.get(form)
    if compiled is None:
        return None
    arguments = {**launch.arguments, **launch.constants}
    x, y, z = (*launch.grid, 1, 1)[:3]
    device = driver.active.get_current_device()
    compiled.run(
        x, y, z, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata, None,
        knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook,
        *[arguments[name] for name in launch.kernel.arg_names],
    )  # fmt: skip
    return compiled


def remember(form: Hashable, compiled: Any) -> None:
    """Keep what Triton launched in this form; None, the interpreter's, is not kept."""
    if compiled is None:
        return
    if len(_compiled) >= _MOST_FORMS:
        _compiled.clear()
    _compiled[form] = compiled
