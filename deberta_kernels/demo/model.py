"""A DeBERTa for the demo: a checkpoint when one can be had, else random weights in the geometry of v3-base."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deberta_kernels.testing import geometries

from .arguments import DEFAULT_MODEL, missing_package
from .checkpoint import hub_problem
from .text import Encoder, hashing_encoder, paragraphs

__all__ = ["Loaded", "load", "prepare_transformers", "shared_copy"]

FEWEST_DISTINCT_TOKENS = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What the demo runs.

    Attributes:
        model: Hugging Face DebertaV2Model in eval mode, on the CPU.
        name: what to call it in the table.
        encode: text to token ids.
        remarks: what the user should know: random weights, stand-in tokenizer.
    """

    model: nn.Module
    name: str
    encode: Encoder
    remarks: tuple[str, ...]


def find_encoder(name: str, vocab_size: int) -> tuple[Encoder, str | None]:
    """Return (text to ids, remark): the checkpoint's own tokenizer if it loads, else the hashing stand-in."""
    from transformers import AutoTokenizer

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        ids = encode(paragraphs()[0])
        problem = None
        # Without tokenizer files, some versions of transformers return a tokenizer that knows no word.
        if len(set(ids)) < FEWEST_DISTINCT_TOKENS or max(ids) >= vocab_size:
            problem = "what is there does not fit the text or the model"
    except Exception as error:  # whatever a checkpoint lacks or a tokenizer library raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        problem = missing_package("sentencepiece", "google.protobuf") or first
    if problem is None:
        return encode, None
    return hashing_encoder(vocab_size), f"no tokenizer in {name} ({problem}): words are hashed to token ids"


def random_model(reason: str) -> Loaded:
    """Return a model in the geometry of v3-base with random weights."""
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = geometries.settings("v3-base")
    torch.manual_seed(0)
    model = DebertaV2Model(DebertaV2Config(**sizes))
    remarks = (
        f"{reason}: random weights in the geometry of {DEFAULT_MODEL}; the costs are those of the real model",
        "no vocabulary without the checkpoint: words are hashed to token ids",
    )
    return Loaded(model, "v3-base geometry, random weights", hashing_encoder(sizes["vocab_size"]), remarks)


def prepare_transformers() -> None:
    """Keep transformers quiet, and this process free of its threads: a process that has some should not be forked."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # which would run in the background
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load(name: str | None, dtype: torch.dtype) -> Loaded:
    """Load the model to measure.

    Args:
        name: hub id or local directory; None asks the hub for v3-base and falls back to random weights.
        dtype: of the parameters.

    Raises:
        OSError: the named checkpoint cannot be loaded.
    """
    prepare_transformers()
    import transformers

    if name is None:
        if problem := hub_problem(DEFAULT_MODEL):
            loaded = random_model(f"no {DEFAULT_MODEL}, {problem}")
            return Loaded(loaded.model.to(dtype).eval(), loaded.name, loaded.encode, loaded.remarks)
        name = DEFAULT_MODEL
    model = transformers.AutoModel.from_pretrained(name, dtype=dtype).eval()
    encode, remark = find_encoder(name, model.config.vocab_size)
    shown = Path(name).name if Path(name).is_dir() else name
    return Loaded(model, shown, encode, (remark,) if remark else ())


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose parameters and buffers are the same tensors, so that two fit in memory."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
