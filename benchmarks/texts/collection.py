"""Texts cut from the one that comes with the package, as ragged as texts are, in batches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.model.batches import Batch
from benchmarks.registry import Texts
from deberta_kernels.demo.text import CLS, PAD, SEP, Encoder, paragraphs

__all__ = ["Collection", "collect", "padded"]

# A sentence ends at one of these; so does a clause at a semicolon, of which the text is full.
ENDS = re.compile(r"(?<=[.;:!?])\s+")


@dataclass(frozen=True)
class Collection:
    """The texts of one case.

    Attributes:
        arriving: batches in the order in which the texts come.
        by_length: batches of the same texts, sorted by length, the longest first.
    """

    arriving: list[Batch]
    by_length: list[Batch]


def padded(rows: list[list[int]]) -> Batch:
    """Return the texts as one batch, padded on the right to the longest."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    return Batch(ids, mask)


def collect(texts: Texts, encode: Encoder) -> Collection:
    """Cut the text into passages and sentences, and lay them out as a case says.

    Args:
        texts: how many of which length.
        encode: text to token ids.
    """
    pieces = [[encode(piece) for piece in ENDS.split(paragraph)] for paragraph in paragraphs()]
    short = [[CLS, *piece, SEP] for paragraph in pieces for piece in paragraph if len(piece) + 2 <= texts.sentence]
    sentences = cycle(short)
    rows: list[list[int]] = []
    for number in range(texts.batches):
        batch = list(islice(sentences, texts.batch - texts.long))
        for index in range(texts.long):
            share = (number * texts.long + index) / (texts.batches * texts.long)
            # Not always first: where it stands in the batch makes no difference to padding.
            batch.insert((3 * number + 2) % texts.batch, passage(pieces, int(share * len(pieces)), texts.longest))
        rows += batch
    starts = range(0, len(rows), texts.batch)
    ordered = sorted(rows, key=len, reverse=True)
    return Collection(
        [padded(rows[start : start + texts.batch]) for start in starts],
        [padded(ordered[start : start + texts.batch]) for start in starts],
    )


def passage(pieces: list[list[list[int]]], first: int, longest: int) -> list[int]:
    """Return the whole sentences, from a paragraph on, that fit; after the last paragraph the first one follows."""
    found: list[int] = []
    for paragraph in [*pieces[first:], *pieces[:first]]:
        for piece in paragraph:
            if len(found) + len(piece) + 2 > longest:
                return [CLS, *found, SEP]
            found += piece
    return [CLS, *found, SEP]
