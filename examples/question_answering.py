"""Extractive question answering: python examples/question_answering.py --data FILE --model ID."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from parts.metrics import answer_scores, best_span
from parts.recipe import run
from parts.sample_text import sentences
from parts.task import Column, Data, Feature, Record, Task
from parts.vocabulary import Encoder
from torch import Tensor

LONGEST_ANSWER = 30  # tokens


def samples() -> list[Record]:
    """Ask which word follows a word that a sentence has once, and now and then a word that it has not."""
    records = []
    for text in sentences():
        words = text.split()
        for place in range(0, len(words) - 1, 3):
            if words.count(words[place]) == 1:
                start = len(" ".join(words[: place + 1])) + 1
                answers = [] if place % 12 == 9 else [(start, words[place + 1])]
                question = f"after {words[place][::-1] if not answers else words[place]}"
                records.append({"question": question, "context": text, "answers": answers})
    return records


def flatten(content: Any) -> list[Any] | None:
    """Return the questions of a file in SQuAD's own format."""
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    if not all(isinstance(article, dict) and "paragraphs" in article for article in content["data"]):
        return list(content["data"])
    paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    return [{**question, "context": paragraph["context"]} for paragraph in paragraphs for question in paragraph["qas"]]


def tidy(values: Record, options: argparse.Namespace) -> Record:
    """Return a row with its answers as [(first character, text)]; none means that the context has no answer."""
    context = str(values["context"])
    found = []
    for start, text in _answers(values):
        if start is None:
            start = context.find(text)
        if start < 0 or context[start : start + len(text)] != text:
            where = (
                "is not in the context"
                if text not in context
                else f"does not stand at character {start} of the context"
            )
            raise ValueError(f"the answer {text[:60]!r} {where}")
        found.append((start, text))
    return {"question": str(values["question"]), "context": context, "answers": found}


def _answers(values: Record) -> list[tuple[int | None, str]]:
    answers = values["answers"]
    if isinstance(answers, dict):  # as data sets of the hub have them
        if not {"text", "answer_start"} <= set(answers):
            raise ValueError(f"answers must have text and answer_start, got {', '.join(map(str, answers))}")
        pairs = list(zip(answers["answer_start"], answers["text"]))
    elif isinstance(answers, list):
        pairs = [(x.get("answer_start"), x.get("text")) if isinstance(x, dict) else (None, x) for x in answers]
    else:
        pairs = [(values.get("answer_start"), answers)] if answers and str(answers).strip() else []
    try:
        return [(int(start) if start not in (None, "") else None, str(text)) for start, text in pairs if text]
    except (TypeError, ValueError) as error:
        raise ValueError(f"answer_start must be a whole number: {error}") from error


def encode(
    record: Record, encoder: Encoder, options: argparse.Namespace, labels: dict[str, int]
) -> list[tuple[dict[str, Tensor], Any]]:
    """Return rows of question and context, in overlapping windows where the context is long.

    The first token, [CLS], is the answer of a window that holds none.
    """
    head = [encoder.cls, *encoder.ids(record["question"])[: options.length // 4], encoder.sep]
    context = encoder.tokens(record["context"])
    room = options.length - len(head) - 1
    shift = max(room - min(options.stride, room // 2), 1)
    rows = []
    for first in range(0, max(len(context) - room, 0) + shift, shift):
        window = context[first : first + room]
        if not window:
            break
        start, end = _ends(record["answers"], window)
        places = [place + len(head) if place >= 0 else 0 for place in (start, end)]
        inputs = {
            "input_ids": torch.tensor([*head, *(token.id for token in window), encoder.sep]),
            "start_positions": torch.tensor(places[0]),
            "end_positions": torch.tensor(places[1]),
        }
        rows.append((inputs, (len(head), [(token.start, token.end) for token in window])))
        if first + room >= len(context):
            break
    return rows


def _ends(answers: list[tuple[int, str]], window: list[Any]) -> tuple[int, int]:
    if not answers:
        return -1, -1
    start, text = answers[0]
    inside = [place for place, token in enumerate(window) if token.end > start and token.start < start + len(text)]
    whole = inside and window[0].start <= start and window[-1].end >= start + len(text)
    return (inside[0], inside[-1]) if whole else (-1, -1)


class AnswerScorer:
    """Exact match and F1 as SQuAD counts them, over whole contexts; of unanswerable questions as well."""

    def __init__(self, data: Data, options: argparse.Namespace) -> None:
        self._records = data.validation
        # A model that never saw a question without an answer is not asked whether there is one.
        self._may_be_none = any(not record["answers"] for record in data.training)
        self._best: dict[int, tuple[float, str]] = {}
        self._none: dict[int, float] = {}
        self._loss, self._rows = 0.0, 0

    def add(self, features: Sequence[Feature], batch: dict[str, Tensor], output: Any) -> None:
        self._loss, self._rows = self._loss + float(output.loss) * len(features), self._rows + len(features)
        for feature, start, end in zip(features, output.start_logits, output.end_logits):
            head, places = feature.extra
            window = slice(head, head + len(places))
            first, last, score = best_span(start[window], end[window], LONGEST_ANSWER)
            context = self._records[feature.record]["context"]
            text = context[places[first][0] : places[last][1]].strip()
            self._best[feature.record] = max(self._best.get(feature.record, (-float("inf"), "")), (score, text))
            none = float(start[0] + end[0])
            self._none[feature.record] = min(self._none.get(feature.record, none), none)

    def result(self) -> dict[str, float]:
        pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number, (score, text) in self._best.items():
            found = "" if self._may_be_none and self._none[number] > score else text
            answers = [answer for _, answer in self._records[number]["answers"]]
            pairs[bool(answers)].append(answer_scores(found, answers))
        every = pairs[True] + pairs[False]
        result = {"f1": _mean(every, 1), "exact_match": _mean(every, 0)}
        if pairs[True] and pairs[False]:
            result |= {"f1_answerable": _mean(pairs[True], 1), "accuracy_unanswerable": _mean(pairs[False], 0)}
        return {**result, "loss": self._loss / self._rows}


def _mean(pairs: list[tuple[float, float]], which: int) -> float:
    return sum(pair[which] for pair in pairs) / max(len(pairs), 1)


def add_options(parser: Any) -> None:
    """Add how far windows overlap."""
    parser.add_argument(
        "--stride", type=int, default=64, help="tokens that windows of a long context share (default: 64)"
    )


TASK = Task(
    title="Extractive question answering",
    head="AutoModelForQuestionAnswering",
    pipeline="question-answering",
    columns=(
        Column("question", "question", "the question"),
        Column("context", "context", "the text that holds the answer"),
        Column(
            "answers", "answers", "the answer's text, or answers as SQuAD has them; empty: no answer", may_be_empty=True
        ),
        Column(
            "answer_start",
            "answer_start",
            "first character, where answers is a text",
            required=False,
            may_be_empty=True,
        ),
    ),
    samples=samples,
    texts=lambda record: [record["question"], record["context"]],
    encode=encode,
    tidy=tidy,
    flatten=flatten,
    group=lambda record: record["context"],
    add_options=add_options,
    scorer=AnswerScorer,
    metrics=("f1", "exact_match", "loss"),
)

if __name__ == "__main__":
    sys.exit(run(TASK))
