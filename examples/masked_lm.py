"""Masked language modelling with the enhanced mask decoder: python examples/masked_lm.py [--data FILE] [--help]."""

from __future__ import annotations

import sys
from typing import Any

import torch
from recipe import IGNORED, Record, Task, run
from sample_text import sentences
from torch import Tensor
from vocabulary import CLS, PAD, SEP, Encoder

import deberta_kernels as dk

MASKED, REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.15, 0.8, 0.1  # shares; the rest of the masked tokens stays


def default_records() -> list[Record]:
    """Return the sentences."""
    return [{"text": text} for text in sentences()]


def encode(record: Record, encoder: Encoder, longest: int) -> Record | None:
    """Return the features of one text; None where there is hardly any."""
    ids = encoder.ids(record["text"])[: longest - 2]
    return {"input_ids": [CLS, *ids, SEP]} if len(ids) > 2 else None


def mask_tokens(batch: dict[str, Tensor], encoder: Encoder, generator: torch.Generator) -> dict[str, Tensor]:
    """Mask other tokens at every step."""
    ids = batch["input_ids"].clone()
    draw, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    chosen = (draw < MASKED) & (ids != PAD) & (ids != CLS) & (ids != SEP)
    random = torch.randint(SEP + 1, encoder.size, ids.shape, generator=generator)
    labels = torch.where(chosen, ids, IGNORED)
    ids = torch.where(chosen & (kind < REPLACED_BY_MASK), encoder.mask, ids)
    at_random = (kind >= REPLACED_BY_MASK) & (kind < REPLACED_BY_MASK + REPLACED_AT_RANDOM)
    return {**batch, "input_ids": torch.where(chosen & at_random, random, ids), "labels": labels}


def right(batch: dict[str, Tensor], output: Any) -> tuple[int, int]:
    """Count the masked tokens that are predicted."""
    labels = batch["labels"]
    labels = labels[labels != IGNORED]
    return int((output.logits.argmax(-1) == labels).sum()), len(labels)


TASK = Task(
    title="Masked language modelling with the enhanced mask decoder",
    head="DebertaV2ForMaskedLM",
    default_records=default_records,
    columns='"text"',
    texts=lambda record: [record["text"]],
    encode=encode,
    prepare=mask_tokens,
    wrap=dk.EnhancedMaskDecoder,
    right=right,
)

if __name__ == "__main__":
    sys.exit(run(TASK))
