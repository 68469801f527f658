"""The user's checkpoint: the class that its configuration names, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deberta_kernels.demo.arguments import missing_package
from deberta_kernels.demo.checkpoint import MODEL_TYPES
from deberta_kernels.demo.model import prepare_transformers

__all__ = ["Checkpoint", "CheckpointError", "load"]


class CheckpointError(ValueError):
    """A model cannot be measured; the message says why and what to change."""


@dataclass(frozen=True)
class Checkpoint:
    """What is measured.

    Attributes:
        model: of Hugging Face, in eval mode, on the CPU.
        tokenizer: its own.
        name: what to call it.
        longest: tokens it was made for.
        remarks: what the user should know.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    longest: int
    remarks: tuple[str, ...]


def load(name: str, dtype: torch.dtype) -> Checkpoint:
    """Load a checkpoint with its own head.

    Args:
        name: directory or hub id that `demo.checkpoint.check_model` has found.
        dtype: of the weights.

    Raises:
        CheckpointError: it is no DeBERTa, or does not load.
    """
    path = Path(name).expanduser()
    name = str(path) if path.is_dir() else name
    prepare_transformers()
    import transformers

    config = _attempt("its configuration", name, lambda: transformers.AutoConfig.from_pretrained(name))
    if config.model_type not in MODEL_TYPES:
        expected = " or ".join(MODEL_TYPES)
        raise CheckpointError(f"--model must be a DeBERTa (model_type {expected}), got model_type {config.model_type}.")
    of_tokenizers = ("sentencepiece", "google.protobuf")
    load = transformers.AutoTokenizer.from_pretrained
    tokenizer = _attempt("its tokenizer", name, lambda: load(name), *of_tokenizers)
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"--model {name}: its tokenizer must have a padding token, and has none.")
    chosen, remarks = _class_of(config)
    options = {"dtype": dtype, "output_loading_info": True}
    model, report = _attempt("the model", name, lambda: chosen.from_pretrained(name, **options))
    if missing := list(report["missing_keys"]):
        remarks += (f"{len(missing)} weights are not in the checkpoint and random, such as {sorted(missing)[0]}",)
    longest = min(tokenizer.model_max_length, config.max_position_embeddings)
    shown = path.resolve().name if path.is_dir() else name
    return Checkpoint(model.eval(), tokenizer, shown, longest, remarks)


def _attempt(what: str, name: str, load: Callable[[], Any], *needed: str) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a checkpoint lacks or a library of tokenizers raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing = missing_package(*needed)
        message = f"--model {name}: {what} does not load: {reason}" + (f"; {missing}" if missing else "")
        raise CheckpointError(message) from None


def _class_of(config: Any) -> tuple[Any, tuple[str, ...]]:
    """Return (the class that the configuration names, remarks); the encoder without a head where there is none."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name.removeprefix("TF"), None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return found, ()
        return transformers.AutoModel, (f"transformers has no class {name}: the encoder runs without a head",)
    return transformers.AutoModel, ()
