"""Token classification: python examples/token_classification.py [--data FILE] [--help]."""

from __future__ import annotations

import sys
from typing import Any

from recipe import IGNORED, Record, Task, run
from sample_text import sentences
from vocabulary import CLS, SEP, Encoder


def default_records() -> list[Record]:
    """Mark the words of a lower-cased sentence that had a capital letter."""
    return [
        {"tokens": text.lower().split(), "tags": [int(word[0].isupper()) for word in text.split()]}
        for text in sentences()
    ]


def encode(record: Record, encoder: Encoder, longest: int) -> Record:
    """Return the features of one list of words; the first token of a word has its tag."""
    ids, labels = [CLS], [IGNORED]
    for word, tag in zip(record["tokens"], _tags(record)):
        found = encoder.ids(word)
        ids += found
        labels += [int(tag), *[IGNORED] * (len(found) - 1)][: len(found)]
    return {"input_ids": [*ids[: longest - 1], SEP], "labels": [*labels[: longest - 1], IGNORED]}


def _tags(record: Record) -> list[int]:
    return record["tags"] if "tags" in record else record["ner_tags"]


def settings(records: list[Record]) -> dict[str, Any]:
    """Return the number of tags."""
    return {"num_labels": 1 + max(int(tag) for record in records for tag in _tags(record))}


TASK = Task(
    title="Token classification",
    head="DebertaV2ForTokenClassification",
    default_records=default_records,
    columns='"tokens", words, and "tags" (or "ner_tags"), numbers',
    texts=lambda record: [" ".join(record["tokens"])],
    encode=encode,
    settings=settings,
)

if __name__ == "__main__":
    sys.exit(run(TASK))
