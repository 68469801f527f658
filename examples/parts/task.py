"""What an example trains: a task, its columns, and the values that travel between its parts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .vocabulary import Encoder

__all__ = ["IGNORED", "Column", "Data", "Feature", "InputError", "Record", "Scorer", "Task"]

Record = dict[str, Any]
IGNORED = -100  # label of a token that has none


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to change."""


class Column(NamedTuple):
    """A value that every row has; --NAME-column says which column of the file it is."""

    name: str
    default: str
    help: str
    required: bool = True  # else the whole column may be missing
    may_be_empty: bool = False


class Feature(NamedTuple):
    """One row of tokens with its labels, what record it is of, and what its scorer needs beside."""

    inputs: dict[str, Tensor]
    record: int
    extra: Any = None


@dataclass
class Data:
    """The records to train with and to evaluate with, and the labels of both by name, in order of their numbers."""

    training: list[Record]
    validation: list[Record]
    labels: list[str] | None


class Scorer(Protocol):
    """Collects predictions, and makes metrics of them."""

    def add(self, features: Sequence[Feature], batch: dict[str, Tensor], output: Any) -> None:
        """Take what the model said to a batch."""

    def result(self) -> dict[str, float]:
        """Return the metrics by name."""


def _unchanged(batch: dict[str, Tensor], encoder: Encoder, generator: torch.Generator) -> dict[str, Tensor]:
    return batch


@dataclass
class Task:
    """What an example trains.

    Attributes:
        title: one line for --help.
        head: name of the automatic class in transformers.
        pipeline: name of the task on the hub, for the model card.
        columns: what a row has.
        samples: makes records where no data is given.
        texts: the texts of a record, from which a vocabulary is trained.
        encode: record, encoder, options, number of each label -> rows of inputs, each with what its scorer needs.
        scorer: data, options -> scorer.
        metrics: names that the scorer gives; the first decides which checkpoint is best.
        lower_is_better: those of them.
        tidy: values of a row, options -> record; ValueError says what is wrong with the row.
        labels_of: the labels of a record, by name.
        group: records of the same group stay together when a part is held out.
        check: records -> what is wrong with all of them together, or None.
        add_options: adds options of this task.
        flatten: content of a JSON file that is no list -> list of objects, or None.
        prepare: changes a batch before each step.
        wrap: puts a module around the model.
        needs_positions: the model learns a vector for each absolute position, so that no text may be longer.
    """

    title: str
    head: str
    pipeline: str
    columns: tuple[Column, ...]
    samples: Callable[[], list[Record]]
    texts: Callable[[Record], Iterable[str]]
    encode: Callable[[Record, Encoder, argparse.Namespace, dict[str, int]], list[tuple[dict[str, Tensor], Any]]]
    scorer: Callable[[Data, argparse.Namespace], Scorer]
    metrics: tuple[str, ...]
    lower_is_better: frozenset[str] = frozenset({"loss", "perplexity"})
    tidy: Callable[[Record, argparse.Namespace], Record] = lambda values, options: values
    labels_of: Callable[[Record], list[str]] | None = None
    group: Callable[[Record], Hashable] = id
    add_options: Callable[[Any], None] = lambda parser: None
    check: Callable[[list[Record]], str | None] = lambda records: None
    flatten: Callable[[Any], list[Any] | None] = lambda content: None
    prepare: Callable[[dict[str, Tensor], Encoder, torch.Generator], dict[str, Tensor]] = field(
        default_factory=lambda: _unchanged
    )
    wrap: Callable[[Any], Any] = lambda model: model
    needs_positions: bool = False
