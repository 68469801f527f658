"""Extractive question answering: python examples/question_answering.py [--data FILE] [--help]."""

from __future__ import annotations

import sys
from typing import Any

from recipe import Record, Task, run
from sample_text import sentences
from torch import Tensor
from vocabulary import CLS, SEP, Encoder


def default_records() -> list[Record]:
    """Ask which word follows a word that a sentence has once."""
    records = []
    for text in sentences():
        words = text.split()
        for place in range(0, len(words) - 1, 3):
            if words.count(words[place]) == 1:
                before = " ".join(words[: place + 1])
                answer = {"text": [words[place + 1]], "answer_start": [len(before) + 1]}
                records.append({"question": f"after {words[place]}", "context": text, "answers": answer})
    return records


def encode(record: Record, encoder: Encoder, longest: int) -> Record | None:
    """Return the features of one question; None where its answer is cut off or missing."""
    answers = record["answers"]
    if not answers["text"]:
        return None
    start = int(answers["answer_start"][0])
    end = start + len(answers["text"][0])
    head = [CLS, *encoder.ids(record["question"])[: longest // 4], SEP]
    context = encoder.tokens(record["context"])[: longest - len(head) - 1]
    inside = [number for number, token in enumerate(context) if token.end > start and token.start < end]
    if not inside:
        return None
    ids = [*head, *(token.id for token in context), SEP]
    return {"input_ids": ids, "start_positions": len(head) + inside[0], "end_positions": len(head) + inside[-1]}


def right(batch: dict[str, Tensor], output: Any) -> tuple[int, int]:
    """Count the answers both of whose ends are right."""
    starts = output.start_logits.argmax(-1) == batch["start_positions"]
    ends = output.end_logits.argmax(-1) == batch["end_positions"]
    return int((starts & ends).sum()), len(starts)


TASK = Task(
    title="Extractive question answering",
    head="DebertaV2ForQuestionAnswering",
    default_records=default_records,
    columns='"question", "context" and "answers" as SQuAD has them; JSON lines or a data set',
    texts=lambda record: [record["context"]],
    encode=encode,
    right=right,
)

if __name__ == "__main__":
    sys.exit(run(TASK))
