"""Text as token ids, and these as places in the text: a checkpoint's tokenizer, or one trained on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

__all__ = ["Encoder", "Token", "train_tokenizer"]

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")  # in the order of every DeBERTa vocabulary
LARGEST = 4000  # pieces of a vocabulary trained on the spot
MOST_TEXTS = 20_000  # that it is trained on


class Token(NamedTuple):
    """One token: its id, and where it begins and ends in the text, in characters."""

    id: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the ids of its special tokens."""

    tokenizer: Any

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return len(self.tokenizer)

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def cls(self) -> int:
        return int(self.tokenizer.cls_token_id)

    @property
    def sep(self) -> int:
        return int(self.tokenizer.sep_token_id)

    @property
    def mask(self) -> int:
        return int(self.tokenizer.mask_token_id)

    def tokens(self, text: str) -> list[Token]:
        """Return the tokens of a text."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [Token(number, *place) for number, place in zip(found["input_ids"], found["offset_mapping"])]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def train_tokenizer(texts: Any) -> Any:
    """Train a vocabulary of pieces on these texts, and return a tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=LARGEST, special_tokens=list(SPECIAL), unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(islice(texts, MOST_TEXTS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **dict(zip(names, SPECIAL))
    )
