"""Who looks on: hooks, wrappers and replaced calls that see what goes into a module or comes out of it.

A hook may look at anything, unless it is one of those that are known, by their exact type, to move weights only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from deberta_kernels.torch_state.originals import Originals, is_own

# On a forward that `kernels` puts on an instance: it goes on to that of the class where this package made that.
LAYER = "__deberta_kernels_layer__"

__all__ = [
    "LAYER",
    "are_instances_watched",
    "calls_differently",
    "forward_below_accelerate",
    "has_forward_hooks",
    "has_hooks",
    "hooks_registered",
    "is_watched",
    "own_forward_bound",
    "register_hooks",
    "sees_every_call",
]

_CALL = Originals(
    (nn.Module, "__call__", "torch.nn.modules.module", "Module._wrapped_call_impl"),
    (nn.Module, "_call_impl", "torch.nn.modules.module", "Module._call_impl"),
)
# Calls of classes of their own, which show nobody anything.
_OTHER_CALLS = (
    ("transformers.modeling_layers", "GradientCheckpointingLayer.__call__"),
    ("torch.nn.modules.container", "ParameterDict.__call__"),
    ("torch.nn.modules.container", "ParameterList.__call__"),
)
# What changes the calls of one module when its instance has it.
_INSTANCE_CALLS = {"forward", "_call_impl", "_compiled_call_impl"}
# Return the hooks on one module, given its __dict__: four dictionaries, empty where there are none.
_hooks_of = itemgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NOT_COMPILED = "_compiler_disable.<locals>.wrapper"  # around some of its methods
_NEW_FORWARD = ("accelerate.hooks", "add_hook_to_module.<locals>.new_forward")
# accelerate's hooks that move weights, and its hook that does nothing.
_MOVERS = ("AlignDevicesHook", "CpuOffload", "ModelHook")
# Methods of these classes are hooks that gather, scatter or compute weights: (module, class).
_WEIGHT_HOOKS = (
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState"),
    ("torch.nn.utils.weight_norm", "WeightNorm"),
    ("torch.nn.utils.spectral_norm", "SpectralNorm"),
    ("torch.utils.module_tracker", "ModuleTracker"),  # which counts calls, for FlopCounterMode
)
# Other packages' hooks that may see whatever a patched model hands over: (module, qualified name).
_registered: list[tuple[str, str]] = []


def register_hooks(*hooks: tuple[str, str]) -> None:
    """Register hooks, as (module, qualified name), that may see whatever a patched model hands over."""
    _registered.extend(hooks)


def sees_every_call() -> str | None:
    """Return who looks at the calls of all modules, a global hook or another way to call them; None if nobody does."""
    replaced = _CALL.replaced()
    if replaced is not None:
        return replaced
    if _has_any_global_hook() and not all(map(_is_known, _global_hooks())):
        return "a hook sees the calls of all modules"
    return None


def _global_hooks() -> Iterator[Any]:
    home: Any = nn.modules.module
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        yield from getattr(home, f"_global_{kind}_hooks").values()


def hooks_registered() -> int:
    """Return a number that changes whenever a hook is registered, on whatever module or tensor."""
    return RemovableHandle.next_id


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether calling a module runs hooks of its own: all that a tracer can follow, and known hooks count too."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(*modules: nn.Module) -> bool:
    """Tell whether a call of one of some modules, or its backward, runs anything but the forward of its class.

    Known hooks count, those of all modules too, and code that `module.compile()` made: for what replaces a call whole.
    """
    for module in modules:
        own = module.__dict__
        if "forward" in own or "_call_impl" in own or any(_hooks_of(own)) or module._compiled_call_impl is not None:
            return True
    return bool(_has_any_global_hook())


def is_watched(module: nn.Module) -> bool:
    """Tell whether somebody looks at the calls of one module, forward or backward; known hooks do not."""
    own, cls = module.__dict__, type(module)
    if any(_hooks_of(own)) or not own.keys().isdisjoint(_INSTANCE_CALLS):  # as hardly any have
        if not all(_is_known(hook) for kind in _hooks_of(own) for hook in kind.values()):
            return True
        if "forward" in own and own_forward_bound(module) is None and not _is_moved_by_accelerate(module):
            return True
        if "_call_impl" in own or not _is_compiled_by_torch(module):
            return True
    is_plain = cls.__call__ is nn.Module.__call__ and cls._call_impl is nn.Module._call_impl
    return not is_plain and calls_differently(cls)


def are_instances_watched(modules: Iterable[nn.Module | None]) -> bool:
    """Tell whether one of some modules `is_watched`, their classes aside: of those see `calls_differently`."""
    for module in modules:
        if module is None:
            continue
        own = module.__dict__
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
            or "forward" in own
            or "_call_impl" in own
            or "_compiled_call_impl" in own
        ) and is_watched(module):
            return True
    return False


def calls_differently(cls: type[nn.Module]) -> bool:
    """Tell whether the modules of a class are called in a way of its own, which may show the calls to others."""
    if cls._call_impl is not nn.Module._call_impl:
        return True
    return cls.__call__ is not nn.Module.__call__ and not any(is_own(cls.__call__, *way) for way in _OTHER_CALLS)


def forward_below_accelerate(module: nn.Module) -> Callable[..., Any] | None:
    """Return the class's forward, unbound, that accelerate's hooks on an instance go on to; None without such hooks."""
    forward, kept = module.__dict__.get("forward"), module.__dict__.get("_old_forward")
    if not isinstance(forward, functools.partial) or not is_own(forward.func, *_NEW_FORWARD):
        return None
    if not isinstance(kept, types.MethodType) or kept.__self__ is not module:
        return None
    return kept.__func__


def own_forward_bound(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward on a module's instance, unbound, if it only says what the class does; None otherwise.

    The package `kernels` binds the forward of the class where it has no other, and this package's layer goes on to it.
    """
    forward = module.__dict__.get("forward")
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return None
    function = forward.__func__
    return function if function is type(module).forward or hasattr(function, LAYER) else None


def _is_moved_by_accelerate(module: nn.Module) -> bool:
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", ()) if type(hook).__name__ == "SequentialHook" else (hook,)
    return all(map(_is_mover, hooks)) and forward_below_accelerate(module) is type(module).forward


def _is_mover(hook: Any) -> bool:
    """Tell whether a hook is one of accelerate's that move weights, as accelerate wrote it."""
    if not _is_of(hook, "accelerate.hooks", _MOVERS):
        return False
    for name in ("pre_forward", "post_forward"):
        function, homes = getattr(type(hook), name), type(hook).__mro__[:-1]
        if is_own(function, "accelerate.hooks", _NOT_COMPILED):
            function = getattr(function, "__wrapped__", None)
        if name in vars(hook) or not any(is_own(function, c.__module__, f"{c.__qualname__}.{name}") for c in homes):
            return False
    return True


def _is_compiled_by_torch(module: nn.Module) -> bool:
    """Tell whether `module.compile()` made what the instance has for its calls, if it has anything."""
    compiled = module.__dict__.get("_compiled_call_impl")
    inner = getattr(compiled, "_torchdynamo_orig_callable", None)
    return compiled is None or (getattr(inner, "__self__", None) is module and inner == module._call_impl)


def _is_known(hook: Any) -> bool:
    if any(is_own(hook, *known) for known in _registered):
        return True
    owner = getattr(hook, "__self__", hook)
    return any(_is_of(owner, home, (name,)) for home, name in _WEIGHT_HOOKS)


def _is_of(value: Any, home: str, names: tuple[str, ...]) -> bool:
    cls = type(value)
    return cls.__module__ == home and cls.__qualname__ in names
