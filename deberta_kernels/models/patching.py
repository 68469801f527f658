"""DeBERTa models patched to run fused attention, and unpatched: one model, or all of them."""

from __future__ import annotations

import textwrap
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels import dispatch, dtypes, native, notices
from deberta_kernels.linear import products
from deberta_kernels.models.dense import fuse_dense
from deberta_kernels.models.fused import FusedAttention, FusedEncoder, attention_refusal, is_ours
from deberta_kernels.models.guards.running import paused
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.patched_class import Patched, has_patched_class, patch_class, restore_class
from deberta_kernels.models.position_tables import forget, forget_all
from deberta_kernels.models.registry import Kind, install, row_of, rows, uninstall

__all__ = ["PatchReport", "patch", "patch_all", "unpatch", "unpatch_all"]

# Attributes under which other objects hold a module: pipelines, trainers and spaCy's components `model`, recognizers of
# Presidio `ner_pipeline`, its component for spaCy `pipeline`, spacy-transformers' model `transformer`.
_HOLDERS = ("model", "ner_pipeline", "pipeline", "transformer")
_DEEPEST = 3  # a spaCy component holds a pipeline, which holds the module


class Example(NamedTuple):
    """What decides on the backend of a call."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    backend: str

    def __str__(self) -> str:
        try:
            problem = dispatch.ordinary_call(self.device, self.dtype, self.heads, self.head_dim)
        except (RuntimeError, AssertionError) as error:  # the device is full, or was one of another machine
            reason = str(error).partition("\n")[0].partition(". ")[0]
            return f"{dtypes.name(self.dtype)} on {self.device}: no tensor can be made there ({reason})"
        return dispatch.outlook(problem, self.backend)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    Attributes:
        patched: number of attention modules that now run through the kernels.
        left_alone: name of each DeBERTa module that still runs its own code -> reason.
        encoders: number of encoders that no longer build N x N tensors.
        example: a call as the model makes them, and the backend that was asked for; None where nothing was patched, or
            the model is on no device yet. The text says what would run it, and has a GPU's kernels compiled for that.
    """

    patched: int
    left_alone: dict[str, str] = field(default_factory=dict)
    encoders: int = 0
    example: Example | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        head = f"patched {_counted(self.patched, 'attention module')}"
        if self.encoders:
            head += f" and {_counted(self.encoders, 'encoder')}"
        elif self.patched:
            head += ", without the encoder around it: N x N masks and distances are still built"
        names: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            names.setdefault(reason, []).append(name or "the model itself")
        lines = [
            f"  left alone: {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {reason}"
            for reason, found in names.items()
        ]
        runs = [] if self.example is None else textwrap.indent(str(self.example), "  ").splitlines()
        return "\n".join([head, *runs, *lines])


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def patch(
    model: object,
    *,
    backend: str = "auto",
    unpad: str | bool = "auto",
    strict: bool = False,
    fast_linears: str | bool = "auto",
) -> PatchReport:
    """Make every DeBERTa (v1, v2 or v3) inside a model run fused attention, in place.

    Encoder and attention modules get a subclass of their own class; nothing else changes, and `unpatch` undoes it.
    Patching again only changes the options. A model pickled while patched needs this package to be loaded.

    Args:
        model: a Hugging Face model with any head, one inside PEFT or with AdapterHub's adapters, or any module with
            DeBERTa somewhere inside (SentenceTransformer, CrossEncoder, GLiNER); or what holds one as `.model`: a
            pipeline, a Trainer (without model_init, which makes another model); a recognizer of Presidio, a component
            of spaCy.
        backend: "auto" or the name of a backend, which then never falls back to another one.
        unpad: whether the encoder leaves out the padding of a batch: "auto", where that pays; True, wherever it can;
            False, never. Results are the same, padded rows included (without dropout).
        strict: raise NotImplementedError where a call, or the model, would run the original code, or where the best
            backend of the device refuses a call; without it that is one warning per reason.
        fast_linears: whether plain linear layers on the CPU are computed in faster ways than PyTorch's: "auto", where
            some are known for the processor, in inference, and bfloat16 and float16 without instructions for them in
            training as well; True, on any processor, and float32 in training as well; or False. They are as exact as
            PyTorch's. With linear layers the dropouts of hidden states and relative embeddings are taken over: same
            distribution, other bits.

    Returns:
        What was patched, and what was left alone and why.

    Raises:
        TypeError: model neither is nor holds a module, or strict is not a bool.
        ValueError: no DeBERTa inside, or an unknown backend, unpad or fast_linears.
        RuntimeError: the backend's module does not load.
        NotImplementedError: fast_linears=True without the native library; or strict, and something was left alone.
    """
    options = _options(backend, unpad, strict, fast_linears)
    if callable(_held(model, "model_init").get("model_init")):
        notices.warn_once(
            f"{type(model).__name__} has a model_init, which makes another model when it trains, and that one is not "
            "patched; patch the model inside model_init, before it is returned."
        )
    model = _module_of(model)
    encoders, attentions, left_alone = _find(model)
    if not attentions and not encoders and not left_alone:
        raise ValueError(
            f"model must contain a DeBERTa of transformers, got {type(model).__name__} without one; "
            "patch it after it is built or loaded."
        )
    first: dict[str, str] = {}
    for name, reason in left_alone.items():
        first.setdefault(reason, name or type(model).__name__)
    for reason, name in first.items():
        notices.fallback(
            f"{name} was left alone: {reason}",
            "only models that run the code of transformers or AdapterHub are fused",
            strict,
        )
    for module in encoders:
        patch_class(module, FusedEncoder, options)
        fuse_dense(module, options)
    for module in attentions:
        patch_class(module, row_of(module, Kind.ATTENTION).mixin, options)
    example = _example(model, attentions[0], backend) if attentions else None
    return PatchReport(len(attentions), left_alone, len(encoders), example)


def _example(model: nn.Module, attention: nn.Module, backend: str) -> Example | None:
    """Return what one attention module calls for; quantised weights say nothing of the dtype, norms do."""
    parameters = (x for module in (attention, model) for x in module.parameters() if x.is_floating_point())
    weight = next(parameters, None)
    if weight is None or weight.is_meta:
        return None
    heads = int(attention.num_attention_heads)  # type: ignore[arg-type]
    return Example(weight.device, weight.dtype, heads, int(attention.all_head_size) // heads, backend)  # type: ignore[arg-type]


def _module_of(model: object) -> nn.Module:
    """Return the model if it is a module, else the module that it holds.

    Raises:
        TypeError: neither.
    """
    if isinstance(model, type):
        raise TypeError(f"model must be a torch.nn.Module, got the class {model.__name__}; pass an instance of it.")
    level: list[object] = [model]
    for _ in range(_DEEPEST + 1):
        for one in level:
            if isinstance(one, nn.Module):
                return one
        level = [value for one in level for value in _held(one, *_HOLDERS).values()]
    held = "".join(f", whose .model is a {type(value).__name__}" for value in _held(model, "model").values())
    raise TypeError(
        f"model must be a torch.nn.Module, got {type(model).__name__}{held}; "
        "pass the model itself, or a pipeline, Trainer or the like that holds it as .model."
    )


def _held(holder: object, *names: str) -> dict[str, object]:
    """Return the attributes of these names that an object has; one whose property raises has it not."""
    found = {}
    for name in names:
        with suppress(Exception):
            found[name] = getattr(holder, name)
    return found


def _find(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module], dict[str, str]]:
    """Find what can be fused in a model, and say why the rest cannot.

    Args:
        model: any module; the transformers package is not imported for it.

    Returns:
        (encoders, attention modules, name of each DeBERTa module left alone -> reason).
    """
    left_alone: dict[str, str] = {}
    encoders: list[nn.Module] = []
    attentions: list[nn.Module] = []
    for name, module in model.named_modules():
        for modules, kind, refusal in (
            (encoders, Kind.ENCODER, _encoder_refusal),
            (attentions, Kind.ATTENTION, attention_refusal),
        ):
            if not _is_called(module, kind):
                continue
            reason = refusal(module)
            if reason is None:
                modules.append(module)
            else:
                left_alone[name] = reason
    # Without any attention to serve, an encoder has nothing to gain.
    fused = set(attentions)
    encoders = [one for one in encoders if any(module in fused or is_ours(module) for module in one.modules())]
    return encoders, attentions, left_alone


def _is_called(module: nn.Module, kind: Kind) -> bool:
    """Tell whether a module has a class of a name of this kind: Hugging Face's, subclasses, and others called alike."""
    names = {row.name for row in rows(kind)}
    classes = type(module).__mro__
    return any(c.__name__ in names and not c.__module__.startswith(f"{PACKAGE}.") for c in classes)


def _encoder_refusal(module: nn.Module) -> str | None:
    return row_of(module, Kind.ENCODER).refusal(module)


def unpatch(model: object) -> int:
    """Give every module that `patch` changed inside a model its own class back.

    A forward that another thread has begun ends patched, and is waited for; one that begins meanwhile is not patched.

    Args:
        model: what was given to `patch`, or any module that contains it; one that is not patched stays as it is.

    Returns:
        Number of attention modules and encoders that changed.

    Raises:
        TypeError: model neither is nor holds a module.
        RuntimeError: something made subclasses of the patched classes since; nothing was changed.
    """
    modules = list(_module_of(model).modules())
    for module in modules:
        if isinstance(module, Patched) and not has_patched_class(module):
            restore_class(module)  # raises, before anything changed
    fused = [module for module in modules if isinstance(module, (FusedAttention, FusedEncoder))]
    with paused(fused):
        for module in modules:
            if restore_class(module):
                forget(module)
    return len(fused)


def patch_all(
    *, backend: str = "auto", unpad: str | bool = "auto", strict: bool = False, fast_linears: str | bool = "auto"
) -> None:
    """Make every DeBERTa of transformers run fused attention: those in memory and all made from now on.

    The forwards of their classes are replaced, so models keep their classes. A model that was given to `patch` keeps
    its own options. Models whose attention is neither Hugging Face's nor AdapterHub's run their own
    code, with one warning.

    Args:
        backend: as in `patch`.
        unpad: as in `patch`.
        strict: as in `patch`.
        fast_linears: as in `patch`.

    Raises:
        ValueError: an unknown backend, unpad or fast_linears.
        ImportError: transformers is not installed, or does not import.
        RuntimeError: the backend's module does not load.
        NotImplementedError: fast_linears=True without the native library, or classes of transformers that are not
            known.
    """
    install(_options(backend, unpad, strict, fast_linears))


def unpatch_all() -> None:
    """Undo `patch_all`; models given to `patch` stay patched."""
    uninstall()
    forget_all()


def _options(backend: str, unpad: str | bool, strict: bool, fast_linears: str | bool) -> AttentionOptions:
    dispatch.check_backend(backend)
    if backend != "auto":
        dispatch.load(backend)
    for name, value in (("unpad", unpad), ("fast_linears", fast_linears)):
        if not isinstance(value, bool) and value != "auto":
            raise ValueError(f"{name} must be 'auto', True or False, got {value!r}; pass {name}='auto'.")
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {strict!r}; pass True or False.")
    if fast_linears is True and (missing := native.unavailable()) is not None:
        raise NotImplementedError(f"fast_linears=True is not possible: {missing}; pass fast_linears='auto'.")
    if fast_linears == "auto" and not products.anything_gained():
        fast_linears = False
    return AttentionOptions(backend, strict, unpad, fast_linears)
