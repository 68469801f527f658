"""Texts as batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deberta_kernels.bench.checkpoint import Checkpoint, CheckpointError
from deberta_kernels.demo.measure import Case

__all__ = ["Batches", "encode"]


@dataclass(frozen=True)
class Batches:
    """What the models are given.

    Attributes:
        cases: the batches.
        texts: how many there are in all.
        tokens: real ones in all.
        padded: with padding.
        cut: texts that were longer than the limit.
        longest: tokens of the longest text.
    """

    cases: tuple[Case, ...]
    texts: int
    tokens: int
    padded: int
    cut: int
    longest: int

    @property
    def largest(self) -> Case:
        """Return the batch that takes most memory: that of most scores."""
        return max(self.cases, key=lambda case: case.input_ids.numel() * case.tokens)


def encode(checkpoint: Checkpoint, texts: Sequence[str], batch_size: int, longest: int, by_length: bool) -> Batches:
    """Return texts as padded batches.

    Args:
        checkpoint: its tokenizer and head.
        texts: at least one.
        batch_size: texts in a batch; the last one may have fewer.
        longest: tokens to which a text is cut.
        by_length: sort by length first, the longest ones in front.

    Raises:
        CheckpointError: the tokenizer does not fit the model or the texts.
    """
    tokenizer = checkpoint.tokenizer
    rows = [dict(tokenizer(text)) for text in texts]
    cut = [number for number, row in enumerate(rows) if len(row["input_ids"]) > longest]
    for number in cut:
        rows[number] = dict(tokenizer(texts[number], truncation=True, max_length=longest))
    _check(rows, tokenizer, int(getattr(checkpoint.model.config, "vocab_size", 0)))
    if by_length:
        rows.sort(key=lambda row: len(row["input_ids"]), reverse=True)
    several = type(checkpoint.model).__name__.endswith("ForMultipleChoice")
    starts = range(0, len(rows), batch_size)
    cases = tuple(_case(tokenizer, rows[start : start + batch_size], several) for start in starts)
    return Batches(
        cases,
        len(rows),
        sum(len(row["input_ids"]) for row in rows),
        sum(case.input_ids.numel() for case in cases),
        len(cut),
        max(len(row["input_ids"]) for row in rows),
    )


def _case(tokenizer: Any, rows: list[dict[str, Any]], several: bool) -> Case:
    padded = {name: x[:, None] if several else x for name, x in tokenizer.pad(rows, return_tensors="pt").items()}
    ids, mask = padded.pop("input_ids"), padded.pop("attention_mask")
    return Case(f"{len(rows)} x {ids.shape[-1]}", ids, mask, padded)


def _check(rows: list[dict[str, Any]], tokenizer: Any, vocabulary: int) -> None:
    ids = torch.tensor(sorted({token for row in rows for token in row["input_ids"]}))
    if not ids.numel() or int(ids.max()) >= vocabulary:
        largest = int(ids.max()) if ids.numel() else "no token"
        raise CheckpointError(f"the tokenizer must fit the model's vocabulary of {vocabulary}, got token id {largest}.")
    if set(ids.tolist()) <= set(tokenizer.all_special_ids):
        raise CheckpointError("the tokenizer knows no word of the texts; pass texts in the language of the model.")
