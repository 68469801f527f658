"""The model of a run: loaded, made anew or taken up again, its head held against the labels of the data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.testing import geometries

from .labels import shown
from .task import Data, InputError, Task
from .vocabulary import Encoder, train_tokenizer

__all__ = ["build", "core", "resumed", "save"]


def core(model: Any) -> Any:
    """Return the model of transformers, out of what the task has put around it."""
    return model.model if hasattr(model, "position_embeddings") else model


def _quiet() -> Any:
    # Conversion of old checkpoints runs in a background thread and asks the hub.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def build(task: Task, options: argparse.Namespace, data: Data) -> tuple[nn.Module, Encoder, dict[str, int]]:
    """Load or make the model and its tokenizer.

    Returns:
        The model, patched unless --no-patch; the encoder; the number that each label of the data has in the model.

    Raises:
        InputError: there is no such checkpoint, it is no DeBERTa, or its head does not fit the labels.
    """
    transformers = _quiet()
    automatic = getattr(transformers, task.head)
    if options.model:
        try:
            config = transformers.AutoConfig.from_pretrained(options.model)
            head = _head(automatic, config, options.model)
            tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        except (OSError, ValueError) as error:
            raise _unloadable(options.model, error) from error
        encoder = Encoder(tokenizer)
        _check_tokenizer(encoder, config, options)
        numbers = _fit(config, head.__name__, data.labels, options)
        model = _load(head, config, options)
    else:
        encoder = Encoder(train_tokenizer(text for record in data.training for text in task.texts(record)))
        config = transformers.DebertaV2Config(**geometries.settings("small", vocab_size=encoder.size))
        numbers = _fit(config, "", data.labels, options)
        model = automatic.from_config(config)
    longest = config.max_position_embeddings
    if options.length > longest and (task.needs_positions or config.position_biased_input):
        raise InputError(
            f"--length must be at most {longest}, the absolute positions of this model, got {options.length}."
        )
    return _finish(task, options, model), encoder, numbers


def resumed(
    task: Task, options: argparse.Namespace, state: dict[str, Any], folder: Path
) -> tuple[nn.Module, Encoder, dict[str, int]]:
    """Make the model of an earlier run again, with its weights, from the folder that the run began with."""
    transformers = _quiet()
    config = transformers.AutoConfig.from_pretrained(folder)
    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(folder))
    model = _finish(task, options, getattr(transformers, task.head).from_config(config))
    model.load_state_dict(state["model"])
    return model, encoder, dict(state["numbers"])


def save(model: Any, encoder: Encoder, folder: Path) -> None:
    """Write model and tokenizer as a checkpoint of transformers, which loads without this package."""
    core(model).save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)


def _unloadable(name: str, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    lacks = Path(name).is_dir() and not (Path(name) / "config.json").exists()
    here = "the folder has no config.json" if lacks else "give the folder of a checkpoint or its hub id"
    return InputError(f"--model {name} cannot be loaded; {here}. transformers says: {reason}")


def _head(automatic: Any, config: Any, name: str) -> Any:
    if config.model_type not in ("deberta", "deberta-v2"):
        raise InputError(
            f"--model {name} must be a DeBERTa (v1, v2, v3 or mDeBERTa), got a model of type {config.model_type!r}."
        )
    mapping = automatic._model_mapping
    if type(config) not in mapping:
        raise InputError(
            f"--model {name} is DeBERTa v1, for which transformers has no {automatic.__name__}; take a v2 or v3."
        )
    return mapping[type(config)]


def _check_tokenizer(encoder: Encoder, config: Any, options: argparse.Namespace) -> None:
    if not encoder.tokenizer.is_fast:
        raise InputError(
            f"--model {options.model} has a slow tokenizer; make it a fast one: pip install tokenizers sentencepiece"
        )
    absent = [name for name in ("pad", "cls", "sep", "mask") if getattr(encoder.tokenizer, f"{name}_token_id") is None]
    if absent:
        raise InputError(f"the tokenizer of --model {options.model} has no {', '.join(absent)} token.")
    if encoder.size > config.vocab_size:
        raise InputError(
            f"the tokenizer of --model {options.model} has {encoder.size} tokens, its model {config.vocab_size}; "
            "they are not of the same checkpoint."
        )


def _fit(config: Any, head: str, labels: list[str] | None, options: argparse.Namespace) -> dict[str, int]:
    """Return the number of each label; write them into the configuration where the head is new."""
    if labels is None:
        return {}
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if head in (config.architectures or []) and not options.new_head:
        if set(labels) <= set(own):
            return {name: own.index(name) for name in labels}
        if all(name.isdigit() and int(name) < len(own) for name in labels):
            return {name: int(name) for name in labels}
        raise InputError(
            f"the head of --model {options.model} has {len(own)} labels ({shown(own)}), the data {len(labels)} "
            f"({shown(labels)}), and they are not the same. Start a new head with --new-head, or give the labels "
            "in the data the names of the head."
        )
    config.id2label, config.label2id = dict(enumerate(labels)), {name: number for number, name in enumerate(labels)}
    return dict(config.label2id)


def _load(head: Any, config: Any, options: argparse.Namespace) -> Any:
    # A head of another task can have weights of the same name.
    fresh = options.new_head or head.__name__ not in (config.architectures or [])
    try:
        model, loading = head.from_pretrained(
            options.model, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(options.model, error) from error
    encoder = head.base_model_prefix + "."
    if absent := sorted(key for key in loading["missing_keys"] if key.startswith(encoder)):
        raise InputError(
            f"--model {options.model} lacks {len(absent)} weights of its encoder, the first {absent[0]}; "
            "config.json and weights are not of the same model."
        )
    for entry in loading["mismatched_keys"]:
        key = entry if isinstance(entry, str) else entry[0]  # transformers 5 adds the shapes
        if key.startswith(encoder) or not fresh:
            raise InputError(
                f"{key} of --model {options.model} has not the shape {tuple(model.state_dict()[key].shape)} that its "
                "config.json asks for; they are not of the same model."
            )
    if fresh and hasattr(model, "classifier"):
        nn.init.normal_(model.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    new = {key.partition(".")[0] for key in loading["missing_keys"]}
    new |= {"classifier"} if fresh and hasattr(model, "classifier") else set()
    if new:
        print(f"not in the checkpoint, so trained from nothing: {', '.join(sorted(new))}")
    return model


def _finish(task: Task, options: argparse.Namespace, model: Any) -> Any:
    for parameter in model.parameters():
        # Loaded weights lie where the file has them; some products round by the alignment, and a resumed run must not.
        parameter.data = parameter.data.clone()
    if options.checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # its newer name
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if not options.no_patch:
        print(dk.patch(model))
    return task.wrap(model).to(options.device)
