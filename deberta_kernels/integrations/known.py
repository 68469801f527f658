"""Know whether a module runs exactly the code of a class that this package has a stand-in for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from deberta_kernels.integrations.swap import ORIGINAL, base_class, forward_of, original_forward

__all__ = ["ADAPTERHUB", "ADAPTERHUB_ONE", "MODELING", "MODELING_ONE", "Known"]

# Where the classes of DeBERTa v2 and v3, and those of v1, are at home.
MODELING = "transformers.models.deberta_v2.modeling_deberta_v2"
MODELING_ONE = "transformers.models.deberta.modeling_deberta"
ADAPTERHUB = "adapters.models.deberta_v2.modeling_deberta_v2"
ADAPTERHUB_ONE = "adapters.models.deberta.modeling_deberta"
_PACKAGES = ("transformers.", "adapters.")


class Known(NamedTuple):
    """Name a class whose forward this package can replace, and what else of it a module must not have changed.

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
        forward = original_forward(self.find())
        if forward.__module__ != self.home:
            return f"the forward of {self.name} was replaced by {forward.__module__}.{forward.__qualname__}"
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
        unknown = self.unknown_code()
        if unknown is not None:
            return unknown
        if original_forward(cls) is not original_forward(known):
            return f"{cls.__module__}.{cls.__qualname__} has a forward of its own"
        if forward_of(module) is None:
            return "its forward was replaced on the instance"
        return self.changed_method(module)

    def changed_method(self, module: nn.Module) -> str | None:
        """Return which further method of an instance of the class is not the class's own; None if all are."""
        cls, known = base_class(module), self.find()
        for name in self.methods:
            method: Any = getattr(known, name)
            own: Any = getattr(cls, name, None)
            if own is not method:
                return f"{cls.__module__}.{cls.__qualname__} has its own {name}"
            if not method.__module__.startswith(_PACKAGES):
                return f"the {name} of {self.name} was replaced by {method.__module__}.{method.__qualname__}"
            if name in module.__dict__:
                return f"its {name} was replaced on the instance"
        return None
