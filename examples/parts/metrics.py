"""The metrics of the tasks, in plain Python."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .task import IGNORED, Feature

__all__ = ["ClassScorer", "MaskedScorer", "answer_scores", "best_span", "entities", "entity_f1", "macro_f1"]


def macro_f1(expected: Sequence[int], found: Sequence[int]) -> float:
    """Return the mean of the classes' F1, over the classes that are expected or found."""
    right = Counter(x for x, y in zip(expected, found) if x == y)
    of_expected, of_found = Counter(expected), Counter(found)
    classes = set(of_expected) | set(of_found)
    return sum(2 * right[c] / (of_expected[c] + of_found[c]) for c in classes) / max(len(classes), 1)


class ClassScorer:
    """Loss, accuracy and macro F1 of one class for each record; of multiple choice as well."""

    def __init__(self, with_f1: bool = True) -> None:
        self._with_f1, self._loss = with_f1, 0.0
        self._expected: list[int] = []
        self._found: list[int] = []

    def add(self, features: Sequence[Feature], batch: dict[str, Tensor], output: Any) -> None:
        self._loss += float(output.loss) * len(features)
        self._expected += batch["labels"].tolist()
        self._found += output.logits.argmax(-1).tolist()

    def result(self) -> dict[str, float]:
        right = sum(x == y for x, y in zip(self._expected, self._found))
        found = {"accuracy": right / len(self._expected), "loss": self._loss / len(self._expected)}
        return found | ({"macro_f1": macro_f1(self._expected, self._found)} if self._with_f1 else {})


class MaskedScorer:
    """Perplexity and accuracy of masked tokens."""

    def __init__(self) -> None:
        self._loss, self._right, self._count = 0.0, 0, 0

    def add(self, features: Sequence[Feature], batch: dict[str, Tensor], output: Any) -> None:
        labels = batch["labels"][batch["labels"] != IGNORED]
        if not len(labels):
            return  # nothing was masked in a very short text
        self._loss += float(output.loss) * len(labels)
        # The enhanced mask decoder gives the logits of the masked tokens only.
        logits = output.logits if output.logits.dim() == 2 else output.logits[batch["labels"] != IGNORED]
        self._right += int((logits.argmax(-1) == labels).sum())
        self._count += len(labels)

    def result(self) -> dict[str, float]:
        loss = self._loss / max(self._count, 1)
        accuracy = self._right / max(self._count, 1)
        return {"perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy, "loss": loss}


def entities(tags: Iterable[str]) -> set[tuple[int, int, str]]:
    """Return (first word, word after the last, kind) of the entities that BIO tags mark.

    As conlleval has it: I- after another kind, or after none, begins an entity too.
    """
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, name
    return found


def entity_f1(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return F1, precision and recall of whole entities, over all texts."""
    right = of_expected = of_found = 0
    for one, other in zip(expected, found):
        wanted, got = entities(one), entities(other)
        right, of_expected, of_found = right + len(wanted & got), of_expected + len(wanted), of_found + len(got)
    return {
        "f1": 2 * right / max(of_expected + of_found, 1),
        "precision": right / max(of_found, 1),
        "recall": right / max(of_expected, 1),
    }


def _normal(text: str) -> list[str]:
    letters = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def answer_scores(found: str, expected: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer, by SQuAD's rules: the best over the expected ones; "" is no answer."""
    if not expected:
        return float(not found), float(not found)
    words = _normal(found)
    best = (0.0, 0.0)
    for answer in expected:
        wanted = _normal(answer)
        same = sum((Counter(words) & Counter(wanted)).values())
        both = len(words) + len(wanted)
        f1 = 2 * same / both if both else 1.0
        best = max(best, (float(words == wanted), f1))
    return best


def best_span(start: Tensor, end: Tensor, most: int) -> tuple[int, int, float]:
    """Return first token, last token and score of the best span of at most `most` tokens, given logits (N,)."""
    count = len(start)
    scores = start[:, None] + end[None, :]
    allowed = torch.ones(count, count, dtype=torch.bool).triu().tril(most - 1)
    flat = int(scores.masked_fill(~allowed, -math.inf).argmax())
    first, last = divmod(flat, count)
    return first, last, float(scores[first, last])
