"""Know whether a module runs exactly the code of a class that this package has a stand-in for.

Asked when a model is patched and again at every call, since anybody may replace a forward, a method or a function of
the modelling file at any time. What is a class's own code is told by where it comes from, see `modules.originals`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from deberta_kernels.models.swap import ORIGINAL, base_class, forward_of, original_function
from deberta_kernels.torch_state.originals import Originals, described, is_own

__all__ = ["ADAPTERHUB", "ADAPTERHUB_ONE", "MODELING", "MODELING_ONE", "Known", "replaced_function", "runs_own"]

# Where the classes of DeBERTa v2 and v3, and those of v1, are at home.
MODELING = "transformers.models.deberta_v2.modeling_deberta_v2"
MODELING_ONE = "transformers.models.deberta.modeling_deberta"
ADAPTERHUB = "adapters.models.deberta_v2.modeling_deberta_v2"
ADAPTERHUB_ONE = "adapters.models.deberta.modeling_deberta"
# Functions of these files that the attention and the encoders call; not every version has all of them.
_FUNCTIONS = (
    "make_log_bucket_position", "build_relative_position", "build_rpos", "scaled_size_sqrt", "compute_attention_span",
    "uneven_size_corrected", "c2p_dynamic_expand", "p2c_dynamic_expand", "pos_dynamic_expand",
)  # fmt: skip
# PyTorch's that the attention is made of: place, name and home as `is_own` knows it.
_OPERATORS = (
    *(
        (torch, name, "_VariableFunctionsClass")
        for name in (
            "bmm", "matmul", "gather", "clamp", "sqrt", "tensor", "arange", "sign", "abs", "log", "ceil", "where",
        )
    ),
    (nn.functional, "softmax", "torch.nn.functional"),
    *(
        (torch.Tensor, name, "TensorBase")
        for name in (
            "masked_fill", "softmax", "bool", "__invert__", "__truediv__", "__add__", "expand", "repeat", "permute",
            "transpose", "unsqueeze", "squeeze", "view", "contiguous", "chunk", "to", "long",
        )
    ),
)  # fmt: skip
# Layers of newer transformers checkpoint themselves inside their forward.
_CHECKPOINTING = "GradientCheckpointingLayer.__init_subclass__.<locals>.forward_with_checkpointing"


class Known(NamedTuple):
    """A class whose forward this package can replace, and what else of it a module must not have changed.

    Attributes:
        home: module that defines the class.
        name: name of the class.
        stand_in: replaces its forward.
        methods: further methods that the stand-in takes for granted.
    """

    home: str
    name: str
    stand_in: Callable[..., Any]
    methods: tuple[str, ...] = ()

    def find(self) -> Any:
        """Return the class; None unless somebody imported its module, since no model needs it then."""
        return getattr(sys.modules.get(self.home), self.name, None)

    def replace_forward(self) -> None:
        """Put the stand-in in place of the class's forward, if the class is there and runs the code we know."""
        cls = self.find()
        if cls is not None and self.unknown_code() is None and cls.forward is not self.stand_in:
            setattr(self.stand_in, ORIGINAL, cls.forward)
            cls.forward = self.stand_in

    def restore_forward(self) -> bool:
        """Put the class's own forward back; return whether it had been replaced."""
        cls = self.find()
        if cls is None or cls.forward is not self.stand_in:
            return False
        cls.forward = getattr(self.stand_in, ORIGINAL)
        return True

    def unknown_code(self) -> str | None:
        """Return why the class's forward is not one that the stand-in can replace; None if it is."""
        forward = original_function(self.find(), "forward")
        if not is_own(forward, self.home, f"{self.name}.forward"):
            return f"the forward of {self.name} was replaced by {described(forward)}"
        found = list(inspect.signature(forward).parameters)
        if found != list(inspect.signature(self.stand_in).parameters):
            package = self.home.partition(".")[0]
            return f"the forward of {self.name} in this {package} takes {found}, which this release does not know"
        return None

    def refusal(self, module: nn.Module) -> str | None:
        """Return why a module must be left alone; None if it runs exactly the code of this class."""
        cls, known = base_class(module), self.find()
        if known is None or not issubclass(cls, known):
            return f"{cls.__module__}.{cls.__qualname__} is not transformers' DeBERTa"
        return self.changed(module) or self.unknown_code()

    def changed(self, module: nn.Module, forward: bool = True) -> str | None:
        """Return which code of an instance of the class is not the class's own; None if all is.

        Args:
            module: the instance.
            forward: look at its forward too; not where the class's own is what is being called.
        """
        cls, known = base_class(module), self.find()
        for name in ("forward", *self.methods) if forward else self.methods:
            if not is_own(original_function(cls, name), *_origin(known, name)):
                return self._describe(cls, known, name)
            if name in module.__dict__ and (name != "forward" or forward_of(module) is None):
                return f"its {name} was replaced on the instance"
        return None

    def _describe(self, cls: type, known: type, name: str) -> str:
        function = original_function(known, name)
        if original_function(cls, name) is not function:
            own = "a forward of its own" if name == "forward" else f"its own {name}"
            return f"{cls.__module__}.{cls.__qualname__} has {own}"
        return f"the {name} of {self.name} was replaced by {described(function)}"


@cache
def _origin(cls: type, name: str) -> tuple[str, str]:
    """Return where a class got a method from, as (module, qualified name)."""
    owner = next(c for c in cls.__mro__ if name in vars(c))
    return owner.__module__, f"{owner.__qualname__}.{name}"


def runs_own(cls: type[nn.Module], prefixes: tuple[str, ...]) -> bool:
    """Tell whether a class runs the forward that some class in its ancestry was written with, in one of these packages.

    Args:
        cls: a class of modules; forwards of this package that stand in for others count as those.
        prefixes: how the names of the packages' modules begin.
    """
    forward = original_function(cls, "forward")
    while is_own(forward, "transformers.modeling_layers", _CHECKPOINTING):  # one for each class on the way
        forward = inspect.getclosurevars(forward).nonlocals.get("forward")
    if is_own(forward, "torch.nn.modules.module", "_forward_unimplemented"):
        return str(cls.__module__).startswith(prefixes)  # a container, which is never called
    home = str(getattr(forward, "__globals__", {}).get("__name__"))
    if not home.startswith(prefixes):
        return False
    return any(is_own(forward, home, f"{c.__qualname__}.forward") for c in cls.__mro__ if c.__module__ == home)


_originals: dict[str, Originals] = {}


def replaced_function(home: str) -> str | None:
    """Return which function that the code of a modelling file calls somebody replaced; None if nobody did."""
    originals = _originals.get(home)
    if originals is None:
        author = MODELING if "deberta_v2" in home else MODELING_ONE
        files = [sys.modules[name] for name in {author, home}]
        originals = _originals[home] = Originals(
            *((file, name, author, name) for file in files for name in _FUNCTIONS if hasattr(file, name)),
            *((place, name, operator_home, name) for place, name, operator_home in _OPERATORS),
            *((file, "torch", "torch", "") for file in files if hasattr(file, "torch")),
            *((file, "nn", "torch.nn", "") for file in files if hasattr(file, "nn")),
        )
    return originals.replaced()
