"""Sequence classification with mixed precision: python examples/sequence_classification.py [--data FILE] [--help]."""

from __future__ import annotations

import sys
from typing import Any

from recipe import Record, Task, run
from sample_text import sentences
from vocabulary import CLS, SEP, Encoder


def default_records() -> list[Record]:
    """Tell sentences from the same sentences with their words turned round."""
    kept = [{"text": text, "label": 0} for text in sentences()]
    turned = [{"text": " ".join(text.split()[::-1]), "label": 1} for text in sentences()]
    return [record for pair in zip(kept, turned) for record in pair]


def encode(record: Record, encoder: Encoder, longest: int) -> Record:
    """Return the features of one text."""
    text = record.get("text", record.get("sentence"))
    return {"input_ids": [CLS, *encoder.ids(str(text))[: longest - 2], SEP], "labels": int(record["label"])}


def settings(records: list[Record]) -> dict[str, Any]:
    """Return the number of classes."""
    return {"num_labels": 1 + max(int(record["label"]) for record in records)}


TASK = Task(
    title="Sequence classification with mixed precision",
    head="DebertaV2ForSequenceClassification",
    default_records=default_records,
    columns='"text" (or "sentence") and "label", a number',
    texts=lambda record: [str(record.get("text", record.get("sentence")))],
    encode=encode,
    settings=settings,
    precision="bfloat16",
)

if __name__ == "__main__":
    sys.exit(run(TASK))
