"""Token classification, such as named entities: python examples/token_classification.py --data FILE --model ID."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from parts.labels import label_name
from parts.metrics import entity_f1, macro_f1
from parts.recipe import run
from parts.sample_text import sentences
from parts.task import IGNORED, Column, Data, Feature, Record, Task
from parts.vocabulary import Encoder
from torch import Tensor


def samples() -> list[Record]:
    """Mark the runs of words of a lower-cased sentence that had capital letters."""
    records = []
    for text in sentences():
        words, tags = text.split(), []
        for place, word in enumerate(words):
            inside = place > 0 and words[place - 1][0].isupper()
            tags.append(("I-CAPITAL" if inside else "B-CAPITAL") if word[0].isupper() else "O")
        records.append({"tokens": text.lower().split(), "tags": tags})
    return records


def tidy(values: Record, options: argparse.Namespace) -> Record:
    """Return a row with lists of words and of tags by name; in a CSV file they are separated by spaces."""
    words, tags = (x.split() if isinstance(x := values[name], str) else x for name in ("tokens", "tags"))
    if not isinstance(words, list) or not isinstance(tags, list):
        raise ValueError("tokens and tags must be lists, or strings with spaces between the words")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} tokens but {len(tags)} tags")
    names = [label_name(tag) for tag in tags]
    if options.tag_names:
        known = options.tag_names.split(",")
        for name in names:
            if not name.isdigit() or int(name) >= len(known):
                raise ValueError(f"tag {name!r} is not the number of one of the {len(known)} --tag-names")
        names = [known[int(name)] for name in names]
    return {"tokens": [str(word) for word in words], "tags": names}


def encode(
    record: Record, encoder: Encoder, options: argparse.Namespace, labels: dict[str, int]
) -> list[tuple[dict[str, Tensor], Any]]:
    """Return the tokens of a list of words; the first of a word has its tag, and a long list becomes several rows."""
    rows, ids, tags = [], list[int](), list[int]()

    def close() -> None:
        if any(tag != IGNORED for tag in tags):
            row = torch.tensor([encoder.cls, *ids, encoder.sep])
            rows.append(({"input_ids": row, "labels": torch.tensor([IGNORED, *tags, IGNORED])}, None))
        ids.clear()
        tags.clear()

    for word, tag in zip(record["tokens"], record["tags"]):
        found = encoder.ids(word)[: options.length - 2]
        if len(ids) + len(found) > options.length - 2:
            close()
        ids += found
        tags += [labels[tag], *[IGNORED] * (len(found) - 1)][: len(found)]
    close()
    return rows


class TagScorer:
    """F1 is that of whole entities where tags are of the form B-, I-, O; else the macro F1 of tags."""

    def __init__(self, data: Data, options: argparse.Namespace) -> None:
        self._names = data.labels or []
        self._loss, self._rows = 0.0, 0
        self._expected: list[list[int]] = []
        self._found: list[list[int]] = []

    def add(self, features: Sequence[Feature], batch: dict[str, Tensor], output: Any) -> None:
        self._loss, self._rows = self._loss + float(output.loss) * len(features), self._rows + len(features)
        for labels, found in zip(batch["labels"], output.logits.argmax(-1)):
            wanted = labels != IGNORED
            self._expected.append(labels[wanted].tolist())
            self._found.append(found[wanted].tolist())

    def result(self) -> dict[str, float]:
        expected, found = ([tag for row in rows for tag in row] for rows in (self._expected, self._found))
        macro = macro_f1(expected, found)
        result = {"f1": macro}
        if any(name.startswith("B-") for name in self._names):
            rows = [[[self._names[tag] for tag in row] for row in rows] for rows in (self._expected, self._found)]
            result = entity_f1(*rows)
        accuracy = sum(x == y for x, y in zip(expected, found)) / len(expected)
        return {**result, "macro_f1": macro, "accuracy": accuracy, "loss": self._loss / self._rows}


def add_options(parser: Any) -> None:
    """Add the names of numbered tags."""
    parser.add_argument("--tag-names", metavar="NAME,NAME", help="of tags that are numbers: O,B-PER,I-PER,...")


TASK = Task(
    title="Token classification",
    head="AutoModelForTokenClassification",
    pipeline="token-classification",
    columns=(
        Column("tokens", "tokens", "the words: a list, or a string with spaces between them"),
        Column("tags", "tags", "a tag for each word: O, B-PER, I-PER or other names, or numbers"),
    ),
    samples=samples,
    texts=lambda record: [" ".join(record["tokens"])],
    encode=encode,
    tidy=tidy,
    labels_of=lambda record: list(record["tags"]),
    add_options=add_options,
    scorer=TagScorer,
    metrics=("f1", "macro_f1", "accuracy", "loss"),
)

if __name__ == "__main__":
    sys.exit(run(TASK))
