"""Classification of texts or pairs of texts: python examples/sequence_classification.py --data FILE --model ID."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from parts.features import CUT
from parts.labels import label_name
from parts.metrics import ClassScorer
from parts.recipe import run
from parts.sample_text import sentences
from parts.task import Column, Record, Task
from parts.vocabulary import Encoder
from torch import Tensor


def samples() -> list[Record]:
    """Tell sentences from the same sentences with their words turned round."""
    kept = [{"text": text, "label": "as written"} for text in sentences()]
    turned = [{"text": " ".join(text.split()[::-1]), "label": "turned round"} for text in sentences()]
    return [record for pair in zip(kept, turned) for record in pair]


def tidy(values: Record, options: argparse.Namespace) -> Record:
    """Return a row with its label by name."""
    return {**values, "text": str(values["text"]), "label": label_name(values["label"])}


def encode(
    record: Record, encoder: Encoder, options: argparse.Namespace, labels: dict[str, int]
) -> list[tuple[dict[str, Tensor], Any]]:
    """Return the tokens of one text or pair; where both are too long, the longer one is cut more."""
    first = encoder.ids(record["text"])
    second = encoder.ids(str(record["pair"])) if record.get("pair") else []
    room = options.length - (3 if second else 2)
    kept = min(len(second), max(room - len(first), room // 2))
    cut = CUT if len(first) + len(second) > room else None
    ids = [encoder.cls, *first[: room - kept], encoder.sep, *([*second[:kept], encoder.sep] if second else [])]
    return [({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels[record["label"]])}, cut)]


TASK = Task(
    title="Sequence classification",
    head="AutoModelForSequenceClassification",
    pipeline="text-classification",
    columns=(
        Column("text", "text", "the text"),
        Column("label", "label", "its class, a name or a whole number"),
        Column("pair", "text_pair", "a second text, of a pair", required=False, may_be_empty=True),
    ),
    samples=samples,
    texts=lambda record: [record["text"]],
    encode=encode,
    tidy=tidy,
    labels_of=lambda record: [record["label"]],
    scorer=lambda data, options: ClassScorer(),
    metrics=("accuracy", "macro_f1", "loss"),
)

if __name__ == "__main__":
    sys.exit(run(TASK))
