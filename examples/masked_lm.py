"""Masked language modelling with the enhanced mask decoder: python examples/masked_lm.py --data FILE --model ID."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from parts.metrics import MaskedScorer
from parts.recipe import run
from parts.sample_text import sentences
from parts.task import IGNORED, Column, Record, Task
from parts.vocabulary import Encoder
from torch import Tensor

import deberta_kernels as dk

MASKED, REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.15, 0.8, 0.1  # shares; the rest of the masked tokens stays
FEWEST = 3  # tokens that are worth a row


def samples() -> list[Record]:
    """Return the sentences."""
    return [{"text": text} for text in sentences()]


def encode(
    record: Record, encoder: Encoder, options: argparse.Namespace, labels: dict[str, int]
) -> list[tuple[dict[str, Tensor], Any]]:
    """Return the tokens of one text, in several rows where it is long."""
    ids, room = encoder.ids(str(record["text"])), options.length - 2
    parts = [ids[start : start + room] for start in range(0, len(ids), room)]
    return [
        ({"input_ids": torch.tensor([encoder.cls, *part, encoder.sep])}, None) for part in parts if len(part) >= FEWEST
    ]


def mask_tokens(batch: dict[str, Tensor], encoder: Encoder, generator: torch.Generator) -> dict[str, Tensor]:
    """Mask other tokens at every step; one at least, since no loss can be had of none."""
    ids = batch["input_ids"].clone()
    draw, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    special = (ids == encoder.pad) | (ids == encoder.cls) | (ids == encoder.sep)
    draw = draw.masked_fill(special, 1.0)
    chosen = (draw < MASKED) | (draw == draw.min())
    random = torch.randint(encoder.size, ids.shape, generator=generator)
    labels = torch.where(chosen, ids, IGNORED)
    ids = torch.where(chosen & (kind < REPLACED_BY_MASK), encoder.mask, ids)
    at_random = (kind >= REPLACED_BY_MASK) & (kind < REPLACED_BY_MASK + REPLACED_AT_RANDOM)
    random = torch.where(random == encoder.pad, encoder.mask, random)  # the pad id is what the mask is made from
    return {**batch, "input_ids": torch.where(chosen & at_random, random, ids), "labels": labels}


TASK = Task(
    title="Masked language modelling with the enhanced mask decoder",
    head="AutoModelForMaskedLM",
    pipeline="fill-mask",
    columns=(Column("text", "text", "the text; a .txt file has one on each line"),),
    samples=samples,
    texts=lambda record: [str(record["text"])],
    encode=encode,
    prepare=mask_tokens,
    wrap=dk.EnhancedMaskDecoder,
    needs_positions=True,
    scorer=lambda data, options: MaskedScorer(),
    metrics=("perplexity", "accuracy", "loss"),
)

if __name__ == "__main__":
    sys.exit(run(TASK))
