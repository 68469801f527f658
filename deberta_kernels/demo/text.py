"""The text of the demo (public domain), and a stand-in tokenizer for checkpoints that bring none."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from importlib import resources

import torch

__all__ = ["Encoder", "hashing_encoder", "paragraphs", "ragged_batch", "single"]

Encoder = Callable[[str], list[int]]

# The first ids of every DeBERTa vocabulary: [PAD] [CLS] [SEP] [UNK].
PAD, CLS, SEP, FIRST_WORD = 0, 1, 2, 4
LETTERS_PER_TOKEN = 8


def paragraphs() -> list[str]:
    """Return the text that comes with the package, one paragraph each.

    Source: Declaration of Independence (1776), Preamble and first amendments of the Constitution of the United States
    (1787, 1791), Gettysburg Address (1863); all in the public domain.
    """
    text = resources.files(__package__).joinpath("text.txt").read_text(encoding="utf-8")
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def hashing_encoder(vocab_size: int) -> Encoder:
    """Return a function from text to token ids that needs no vocabulary file.

    Words, cut after eight letters, and punctuation marks are hashed into the vocabulary. The number of tokens is close
    to that of a real tokenizer; the ids mean nothing to a trained model, but cost it the same.
    """

    def encode(text: str) -> list[int]:
        pieces = re.findall(rf"\w{{1,{LETTERS_PER_TOKEN}}}|[^\w\s]", text)
        return [FIRST_WORD + zlib.crc32(piece.lower().encode()) % (vocab_size - FIRST_WORD) for piece in pieces]

    return encode


def single(encode: Encoder, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, attention_mask), both (1, length) int64, of the text's beginning; repeated if too short."""
    ids = encode("\n".join(paragraphs()))
    room = max(length - 2, 0)
    ids = (ids * (room // len(ids) + 1))[:room]
    row = torch.tensor([[CLS, *ids, SEP][:length]])
    return row, torch.ones_like(row)


def ragged_batch(encode: Encoder, texts: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, attention_mask), both (texts, N) int64: short paragraphs and one long text, padded right.

    Args:
        encode: text to token ids.
        texts: how many; all but one are the shortest paragraphs.
        longest: N, the tokens of the long one, which is the beginning of the whole text.
    """
    short = sorted((encode(part) for part in paragraphs()), key=len)[: texts - 1]
    ids = torch.full((texts, longest), PAD)
    mask = torch.zeros(texts, longest, dtype=torch.int64)
    for row, words in enumerate(short):
        tokens = [CLS, *words[: longest - 2], SEP]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids[-1], mask[-1] = (x[0] for x in single(encode, longest))
    return ids, mask
