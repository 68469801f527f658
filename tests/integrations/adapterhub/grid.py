"""The grid of everything AdapterHub's models can be made of, and a sample of it in which every two choices meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.integrations.adapterhub.setups import COMPOSITIONS, METHODS, MODELS

__all__ = ["HEADS", "ORDERS", "Cell", "all_cells", "pairwise"]

ONE = "one adapter"
FLEXIBLE = "flexible head"
# A patched model with a head of transformers: when it is patched, made AdapterHub's, and given adapters. Or a model of
# AdapterHub's class, with one of its heads.
ORDERS = ("patch, init, add", "init, patch, add", "init, add, patch", "patch_all, init, add", FLEXIBLE)
# How transformers calls the class with such a head, its settings, and how AdapterHub adds one.
HEADS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None]]] = {
    "classification": (
        "ForSequenceClassification",
        {"num_labels": 3},
        lambda model: model.add_classification_head("head", num_labels=3),
    ),
    "multi-label": (
        "ForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        lambda model: model.add_classification_head("head", num_labels=3, multilabel=True),
    ),
    "tagging": (
        "ForTokenClassification",
        {"num_labels": 3},
        lambda model: model.add_tagging_head("head", num_labels=3),
    ),
    "question answering": ("ForQuestionAnswering", {}, lambda model: model.add_qa_head("head")),
    "multiple choice": (
        "ForMultipleChoice",
        {},
        lambda model: model.add_multiple_choice_head("head", num_choices=2),
    ),
    "masked LM": ("ForMaskedLM", {}, lambda model: model.add_masked_lm_head("head")),
}


class Cell(NamedTuple):
    """One cell of the grid: one of everything."""

    method: str
    composition: str
    head: str
    model: str
    order: str

    @property
    def exists(self) -> bool:
        """Whether there is a class: transformers has no DeBERTa v1 for multiple choice."""
        return (self.head, self.model) != ("multiple choice", "DeBERTa v1") or self.order == FLEXIBLE


LEVELS = (tuple(METHODS), (ONE, *COMPOSITIONS), tuple(HEADS), tuple(MODELS), ORDERS)


def all_cells() -> list[Cell]:
    """Return the whole grid; cells that differ only in the order of patching are neighbours."""
    return [cell for cell in itertools.starmap(Cell, itertools.product(*LEVELS)) if cell.exists]


def pairwise() -> list[Cell]:
    """Return few cells in which every two choices that can meet do meet."""
    missing = {pair for cell in all_cells() for pair in _pairs(cell)}
    chosen: list[Cell] = []
    while missing:
        first = min(missing)
        options = [(dict(first)[i],) if i in dict(first) else levels for i, levels in enumerate(LEVELS)]
        chosen.append(_best(options, missing))
        missing -= _pairs(chosen[-1])
    return sorted(chosen)


def _pairs(cell: Sequence[str]) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return set(itertools.combinations(enumerate(cell), 2))


def _best(options: list[tuple[str, ...]], missing: set[Any]) -> Cell:
    """Choose, one factor after the other, what brings the most missing pairs with what is chosen already."""
    order = sorted(range(len(options)), key=lambda i: len(options[i]))
    taken: dict[int, str] = {}
    for i in order:
        gains = {
            level: sum(tuple(sorted([(i, level), (j, other)])) in missing for j, other in taken.items())
            for level in options[i]
            if _may_exist({**taken, i: level})
        }
        taken[i] = max(gains, key=gains.__getitem__)
    return Cell(*(taken[i] for i in range(len(options))))


def _may_exist(taken: dict[int, str]) -> bool:
    known = [taken.get(i) for i in range(len(LEVELS))]
    return any(
        Cell(*cell).exists for cell in itertools.product(*([k] if k else LEVELS[i] for i, k in enumerate(known)))
    )
