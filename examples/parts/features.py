"""Features, padded batches of them, and the order in which a run sees them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .progress import Progress
from .task import IGNORED, Feature, InputError, Record, Task
from .vocabulary import Encoder

__all__ = ["CUT", "Order", "collate", "encode_all", "generator"]


CUT = "cut"  # extra of a feature that has not all of its text


def generator(*numbers: int) -> torch.Generator:
    """Return a generator that depends on these numbers only, so that a resumed run needs no memory of the last one."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def encode_all(
    task: Task,
    options: argparse.Namespace,
    encoder: Encoder,
    records: list[Record],
    labels: dict[str, int],
    what: str = "texts to tokens",
) -> list[Feature]:
    """Return the features of the records: several of one whose text is longer than --length."""
    found = []
    with Progress(len(records), what) as progress:
        for number, record in enumerate(records):
            try:
                rows = task.encode(record, encoder, options, labels)
            except ValueError as error:
                raise InputError(f"{options.data}, {record.get('place', number)}: {error}") from error
            found += [Feature(inputs, number, extra) for inputs, extra in rows]
            progress.at(number + 1)
    if cut := sum(feature.extra is CUT for feature in found):
        print(f"{cut} of {len(records)} texts are longer than --length {options.length}; they were cut")
    if not found:
        raise InputError("no text is left to train on; all are empty once turned into tokens.")
    return found


def _stack(values: list[Tensor], fill: int) -> Tensor:
    longest = max(value.shape[-1] if value.dim() else 0 for value in values)
    padded = [nn.functional.pad(x, (0, longest - x.shape[-1]), value=fill) if x.dim() else x for x in values]
    return torch.stack(padded).long()


def collate(features: Sequence[Feature], pad: int) -> dict[str, Tensor]:
    """Pad features to a batch."""
    names = features[0].inputs
    batch = {
        name: _stack([feature.inputs[name] for feature in features], pad if name == "input_ids" else IGNORED)
        for name in names
    }
    return {**batch, "attention_mask": (batch["input_ids"] != pad).long()}


class Order:
    """Which features each step of the optimizer sees, in a new order each epoch; a function of seed and step.

    Args:
        count: of features.
        batch_size: of one forward.
        accumulation: forwards per step.
        seed: of the orders.
    """

    def __init__(self, count: int, batch_size: int, accumulation: int, seed: int) -> None:
        self._count, self._size, self._seed = count, batch_size, seed
        self._in_step = batch_size * accumulation
        self.steps_per_epoch = -(-count // self._in_step)
        self._epoch, self._order = -1, list[int]()

    def step(self, number: int) -> list[list[int]]:
        """Return the batches of one step: lists of places among the features."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self._count, generator=generator(self._seed, epoch)).tolist()
        chosen = self._order[place * self._in_step : (place + 1) * self._in_step]
        return [chosen[start : start + self._size] for start in range(0, len(chosen), self._size)]
