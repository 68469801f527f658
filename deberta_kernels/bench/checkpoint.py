"""The user's checkpoint: the class that its configuration names, and its tokenizer."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deberta_kernels.demo.checkpoint import hub_problem

__all__ = ["Checkpoint", "CheckpointError", "check_name", "load"]

MODEL_TYPES = ("deberta", "deberta-v2")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
INSTALL = "pip install 'deberta-kernels[demo]'"


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


def check_name(name: str) -> None:
    """Look, before anything is imported or asked of the hub, whether a name can be that of a model.

    Raises:
        CheckpointError: it cannot.
    """
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(f"bench --model needs transformers, which is not installed; {INSTALL}")
    path = Path(name).expanduser()
    if path.is_file():
        raise CheckpointError(f"--model must be a directory or a hub id, and {name} is a file; pass its directory.")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "gliner_config.json").is_file():
            raise CheckpointError(
                f"--model must be a model of transformers, and {name} is GLiNER's; use dk.patch(model)."
            )
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"--model must be a directory that save_pretrained wrote; {name} has no config.json (it has: {found})."
        )
    if not path.exists() and not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"--model must be a directory or a hub id (owner/name), and there is no directory {name}."
        )


def load(name: str, dtype: torch.dtype) -> Checkpoint:
    """Load a checkpoint with its own head.

    Args:
        name: directory or hub id, see `check_name`.
        dtype: of the weights.

    Raises:
        CheckpointError: it is no DeBERTa, or does not load.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # it runs in a thread, and this process is forked
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = Path(name).expanduser()
    if path.is_dir():
        name = str(path)
    elif problem := hub_problem(name):
        raise CheckpointError(
            f"--model {name}: there is no such directory, and {problem}; pass the directory that save_pretrained wrote."
        )
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = _attempt("its configuration", name, lambda: transformers.AutoConfig.from_pretrained(name))
    if config.model_type not in MODEL_TYPES:
        expected = " or ".join(MODEL_TYPES)
        raise CheckpointError(f"--model must be a DeBERTa (model_type {expected}), got model_type {config.model_type}.")
    tokenizer = _attempt("its tokenizer", name, lambda: transformers.AutoTokenizer.from_pretrained(name))
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


def _attempt(what: str, name: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a checkpoint lacks or a library of tokenizers raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing = f"; {INSTALL}" if isinstance(error, ImportError) or "sentencepiece" in str(error).lower() else ""
        raise CheckpointError(f"--model {name}: {what} does not load: {reason}{missing}") from None


def _class_of(config: Any) -> tuple[Any, tuple[str, ...]]:
    """Return (the class that the configuration names, remarks); the encoder without a head where there is none."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name.removeprefix("TF"), None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return found, ()
        return transformers.AutoModel, (f"transformers has no class {name}: the encoder runs without a head",)
    return transformers.AutoModel, ()
