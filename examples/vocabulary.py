"""Text as token ids, and these as places in the text: a checkpoint's tokenizer, or one trained on the spot."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["CLS", "MASK", "PAD", "SEP", "Encoder", "checkpoint_encoder", "train_encoder"]

# The special tokens of every DeBERTa vocabulary but the mask, which comes last in the released ones.
PAD, CLS, SEP, UNK, MASK = range(5)
LARGEST = 4000  # pieces of a vocabulary trained on the spot


class Token(NamedTuple):
    """One token: its id, and where it begins and ends in the text, in characters."""

    id: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and where its tokens lie in the text.

    Attributes:
        size: of the vocabulary.
        mask: id of the mask token.
        split: text -> [(id, start, end)].
    """

    size: int
    mask: int
    split: Any

    def tokens(self, text: str) -> list[Token]:
        """Return the tokens of a text."""
        return [Token(*found) for found in self.split(text)]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [token.id for token in self.tokens(text)]


def train_encoder(texts: list[str]) -> Encoder:
    """Train a SentencePiece vocabulary on these texts."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=LARGEST, hard_vocab_limit=False,
        character_coverage=1.0, num_threads=1, minloglevel=2, pad_id=PAD, bos_id=CLS, eos_id=SEP, unk_id=UNK,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", user_defined_symbols=["[MASK]"],
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())

    def split(text: str) -> list[tuple[int, int, int]]:
        # Nothing is normalised, so that the pieces are the text itself, after one character for the first space.
        found, place = [], -1
        for piece in processor.encode(text, out_type=str):
            found.append((processor.piece_to_id(piece), max(place, 0), place + len(piece)))
            place += len(piece)
        return found

    return Encoder(processor.get_piece_size(), processor.piece_to_id("[MASK]"), split)


def checkpoint_encoder(name: str) -> Encoder:
    """Load the tokenizer of a checkpoint, which must be able to tell where tokens lie."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)

    def split(text: str) -> list[tuple[int, int, int]]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(number, *place) for number, place in zip(found["input_ids"], found["offset_mapping"])]

    return Encoder(len(tokenizer), tokenizer.mask_token_id, split)
