"""A tokenizer of whole words, for small random models that are saved as checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["word_tokenizer"]

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")


def word_tokenizer(words: Iterable[str], longest: int) -> Any:
    """Return a fast tokenizer of transformers that knows these words; "[CLS] A [SEP] B [SEP]" of a pair."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]", model_max_length=longest, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
