"""The classes of modules that may be fused, one row each, and their forwards, replaced for all modules and put back.

Transformers 4.57 and 5.x differ in nothing that matters here. DeBERTa v1 has classes of its own, with the same forwards
by name; the attention class even shares its name. A module is fused only if the code it would run is exactly that of
its row; other subclasses with a forward of their own, other packages' classes of the same name, and attention that
mixes heads are left alone, each for a reason that is reported.

The files that fuse register rows: `fused`, `dense` and `adapterhub`, which importing `deberta_kernels.models` imports.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

from torch import nn

from deberta_kernels.models.anatomy import VERSION_ONE, VERSION_TWO, Anatomy
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.models.guards.running import paused
from deberta_kernels.models.options import choose_for_all, chosen_for_all
from deberta_kernels.models.patched_class import ORIGINAL, Patched, base_class, forward_of, original_function
from deberta_kernels.torch_state.originals import described, is_own

__all__ = [
    "REMEDY",
    "Kind",
    "ModuleClass",
    "attention_methods",
    "fused_row",
    "homes",
    "install",
    "register",
    "register_forward",
    "replace_forwards",
    "row_of",
    "rows",
    "uninstall",
]

REMEDY = "only the code of transformers and AdapterHub is fused"


class Kind(Enum):
    """What a class is in a model."""

    ATTENTION = "attention"
    ENCODER = "encoder"
    INTERMEDIATE = "intermediate"
    OUTPUT = "output"


@dataclass(frozen=True, eq=False)
class ModuleClass:
    """A class whose forward this package can replace, and what else of it a module must not have changed.

    Attributes:
        kind: what it is.
        version: the version of DeBERTa.
        home: module that defines the class.
        name: name of the class.
        mixin: what `patch` mixes into one module.
        run: computes a call for `patch_all`: run(module, ..., original=FORWARD); None: the mixin's forward does.
        methods: further methods that the mixin takes for granted.
        mask_type: what an encoder hands to attention modules of this class in place of a mask.
        assigned_late: modules get this class after a model was patched too, and are fused again then.
        replacement: what `patch_all` puts in place of the class's forward.
    """

    kind: Kind
    version: Anatomy
    home: str
    name: str
    mixin: type[Patched]
    run: Callable[..., Any] | None = None
    methods: tuple[str, ...] = ()
    mask_type: type[EncoderMask] = EncoderMask
    assigned_late: bool = False
    replacement: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "replacement", _replacement(self.mixin, self.run))

    def find(self) -> Any:
        """Return the class; None unless somebody imported its module, since no model needs it then."""
        return getattr(sys.modules.get(self.home), self.name, None)

    def replace_forward(self) -> None:
        """Replace the class's forward, if the class is there and runs the code we know."""
        cls = self.find()
        if cls is not None and self.unknown_code() is None and cls.forward is not self.replacement:
            setattr(self.replacement, ORIGINAL, cls.forward)
            cls.forward = self.replacement

    def restore_forward(self) -> bool:
        """Put the class's own forward back; return whether it had been replaced."""
        cls = self.find()
        if cls is None or cls.forward is not self.replacement:
            return False
        cls.forward = getattr(self.replacement, ORIGINAL)
        return True

    def unknown_code(self) -> str | None:
        """Return why the class's forward is not one that can be replaced; None if it is."""
        forward = original_function(self.find(), "forward")
        if not is_own(forward, self.home, f"{self.name}.forward"):
            return f"the forward of {self.name} was replaced by {described(forward)}"
        found = list(inspect.signature(forward).parameters)
        if found != list(inspect.signature(self.replacement).parameters):
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


def _replacement(mixin: type[Patched], run: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a function to put in place of a class's forward.

    It reads the options at every call, so that new ones hold at once. accelerate's hooks may hold it for longer than
    the class does; then it only calls what it replaced.
    """
    compute: Any = mixin.forward  # type: ignore[attr-defined]

    @functools.wraps(compute)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        original = getattr(forward, ORIGINAL)
        if chosen_for_all() is None and not isinstance(self, Patched):
            return original(self, *arguments, **named)
        if run is None:
            return compute(self, *arguments, **named)
        return run(self, *arguments, original=original, **named)

    return forward


@cache
def _origin(cls: type, name: str) -> tuple[str, str]:
    """Return where a class got a method from, as (module, qualified name)."""
    owner = next(c for c in cls.__mro__ if name in vars(c))
    return owner.__module__, f"{owner.__qualname__}.{name}"


_rows: dict[Kind, list[ModuleClass]] = {kind: [] for kind in Kind}
# Forward of a fused attention module -> a row; those of one mixin agree in all that is asked of this.
_fused: dict[Any, ModuleClass] = {}
_methods = {"forward"}


def register(*found: ModuleClass) -> None:
    """Register rows; classes come before their subclasses, and the first of a kind is for modules of no known class."""
    for row in found:
        _rows[row.kind].append(row)
        if row.kind is Kind.ATTENTION:
            _methods.update(row.methods)
            for forward in (row.replacement, row.mixin.forward):  # type: ignore[attr-defined]
                _fused.setdefault(forward, row)


def register_forward(forward: Callable[..., Any], as_in: Callable[..., Any]) -> None:
    """Register the forward of an attention class of this package's own, which takes what another forward takes."""
    _fused[forward] = _fused[as_in]


def rows(*kinds: Kind) -> Iterator[ModuleClass]:
    """Yield the rows of some kinds."""
    for kind in kinds:
        yield from _rows[kind]


def row_of(module: nn.Module, kind: Kind) -> ModuleClass:
    """Return the row of the class that a module is an instance of; the first of the kind if it is of none."""
    cls = base_class(module)
    for row in reversed(_rows[kind]):
        known = row.find()
        if known is not None and issubclass(cls, known):
            return row
    return _rows[kind][0]


def fused_row(attention: nn.Module) -> ModuleClass | None:
    """Return a row that says what a fused attention module is handed; None if calling the module is not fused."""
    return _fused.get(forward_of(attention))


def attention_methods() -> set[str]:
    """Return the names of the methods of attention modules that no instance may replace."""
    return _methods


@cache
def homes() -> tuple[str, ...]:
    """Return the names of the modules that define classes of rows."""
    return tuple(dict.fromkeys(row.home for row in rows(*Kind)))


def install(options: Any) -> None:
    """Replace the forwards of the classes; again: only change the options.

    Raises:
        ImportError: transformers does not import.
        NotImplementedError: the forwards in this transformers are not the ones this package knows.
    """
    try:
        for version in (VERSION_TWO, VERSION_ONE):
            importlib.import_module(version.home)
    except ImportError as error:
        raise ImportError(
            f"patch_all() needs the package transformers, which does not import ({error}); "
            'pip install "deberta_kernels[transformers]".'
        ) from error
    for row in rows(Kind.ATTENTION, Kind.ENCODER):
        reason = row.unknown_code() if row.home == row.version.home else None
        if reason is not None:
            raise NotImplementedError(f"patch_all() cannot patch {row.name}: {reason}.")
    uninstall()
    choose_for_all(options)
    replace_forwards()


def replace_forwards() -> None:
    """Replace the forwards of the classes that are there by now."""
    options = chosen_for_all()
    fast = options is not None and options.fast_linears
    dense = (Kind.INTERMEDIATE, Kind.OUTPUT) if fast else ()
    for row in rows(Kind.ATTENTION, Kind.ENCODER, *dense):
        row.replace_forward()


def uninstall() -> bool:
    """Put the classes' own forwards back; return whether they had been replaced."""
    with paused(None):
        choose_for_all(None)
        restored = [row.restore_forward() for row in rows(*Kind)]
    return any(restored)
