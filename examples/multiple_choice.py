"""Multiple choice: python examples/multiple_choice.py --data FILE --model ID."""

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
from torch import Tensor, nn

CHOICES = 4


def samples() -> list[Record]:
    """Choose the second half of a sentence among halves of others."""
    texts = [text.split() for text in sentences()]
    halves = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in texts]
    records = []
    for number, (first, _) in enumerate(halves):
        label = number % CHOICES
        others = [halves[(number + 7 * (place - label)) % len(halves)][1] for place in range(CHOICES)]
        records.append({"context": first, "endings": others, "label": label})
    return records


def tidy(values: Record, options: argparse.Namespace) -> Record:
    """Return a row with a list of endings and the number of the right one, counted from 0."""
    endings = values["endings"]
    if isinstance(endings, dict) and isinstance(endings.get("text"), list):  # as CommonsenseQA has them
        endings = endings["text"]
    if isinstance(endings, str):
        endings = [part.strip() for part in endings.split(options.separator)]
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError(f"endings must be a list of two or more texts, or joined by {options.separator!r}")
    if not all(str(ending).strip() for ending in endings):
        raise ValueError("one of the endings is empty")
    name = label_name(values["label"])
    number = int(name) if name.isdigit() else ord(name) - ord("A") if len(name) == 1 else -1
    if not 0 <= number < len(endings):
        raise ValueError(f"label {name!r} must be a number from 0 to {len(endings) - 1}, or a letter from A on")
    return {"context": str(values["context"]), "endings": [str(ending) for ending in endings], "label": number}


def encode(
    record: Record, encoder: Encoder, options: argparse.Namespace, labels: dict[str, int]
) -> list[tuple[dict[str, Tensor], Any]]:
    """Return the tokens of one question: a row for each choice."""
    context = encoder.ids(record["context"])
    rows, cut = [], None
    for ending in record["endings"]:
        chosen = encoder.ids(ending)[: options.length // 2]
        cut = CUT if len(context) + len(chosen) > options.length - 3 else cut
        kept = context[-(options.length - len(chosen) - 3) :]  # what stands next to the ending
        rows.append(torch.tensor([encoder.cls, *kept, encoder.sep, *chosen, encoder.sep]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=encoder.pad)
    return [({"input_ids": ids, "labels": torch.tensor(record["label"])}, cut)]


def add_options(parser: Any) -> None:
    """Add what stands between endings."""
    parser.add_argument("--separator", default="|", help="between endings that are one text, as in CSV (default: |)")


def check(records: list[Record]) -> str | None:
    """Return what is wrong where records differ in the number of their endings, which a batch cannot hold."""
    first = records[0]
    for record in records:
        if len(record["endings"]) != len(first["endings"]):
            return (
                f"{record['place']} has {len(record['endings'])} endings, {first['place']} {len(first['endings'])}; "
                "all rows must have as many"
            )
    return None


TASK = Task(
    title="Multiple choice",
    head="AutoModelForMultipleChoice",
    pipeline="multiple-choice",
    columns=(
        Column("context", "context", "the text to go on with"),
        Column("endings", "endings", "the choices: a list, or a text with | between them"),
        Column("label", "label", "the right one, counted from 0, or a letter from A on"),
    ),
    samples=samples,
    texts=lambda record: [record["context"], *record["endings"]],
    encode=encode,
    tidy=tidy,
    check=check,
    add_options=add_options,
    scorer=lambda data, options: ClassScorer(with_f1=False),
    metrics=("accuracy", "loss"),
)

if __name__ == "__main__":
    sys.exit(run(TASK))
