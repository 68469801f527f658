"""Multiple choice: python examples/multiple_choice.py [--data FILE] [--help]."""

from __future__ import annotations

import sys

from recipe import Record, Task, run
from sample_text import sentences
from vocabulary import CLS, SEP, Encoder

CHOICES = 4


def default_records() -> list[Record]:
    """Choose the second half of a sentence among halves of others."""
    texts = [text.split() for text in sentences()]
    halves = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in texts]
    records = []
    for number, (first, _) in enumerate(halves):
        label = number % CHOICES
        others = [halves[(number + 7 * (place - label)) % len(halves)][1] for place in range(CHOICES)]
        records.append({"context": first, "endings": others, "label": label})
    return records


def encode(record: Record, encoder: Encoder, longest: int) -> Record:
    """Return the features of one question: a row of tokens for each choice."""
    context = encoder.ids(record.get("context", record.get("ctx", "")))[: longest // 2]
    rows = [[CLS, *context, SEP, *encoder.ids(ending)[: longest // 2 - 3], SEP] for ending in record["endings"]]
    return {"input_ids": rows, "labels": int(record["label"])}


TASK = Task(
    title="Multiple choice",
    head="DebertaV2ForMultipleChoice",
    default_records=default_records,
    columns='"context" (or "ctx"), "endings", a list of texts, and "label"; JSON lines or a data set',
    texts=lambda record: [record.get("context", record.get("ctx", "")), *record["endings"]],
    encode=encode,
)

if __name__ == "__main__":
    sys.exit(run(TASK))
