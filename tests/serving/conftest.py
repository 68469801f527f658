"""A tiny classifier with a tokenizer of whole words, saved as a checkpoint; texts for it; the stock model's answers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deberta_kernels.testing import geometries
from tests.checkout import ROOT

EXAMPLES = ROOT / "examples"
WORDS = ["a", "the", "day", "night", "fine", "bad", "good", "film", "plot", "was", "is", "not", "very", "slow", "and"]


@pytest.fixture(scope="session", autouse=True)
def examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a DeBERTa-v2 classifier of three labels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]", model_max_length=512, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    settings = geometries.settings("tiny", max_position_embeddings=512, initializer_range=0.5)
    settings |= {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
    DebertaV2ForSequenceClassification(DebertaV2Config(**settings)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts of 1 to 60 words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(64)]


@pytest.fixture(scope="session")
def stock(checkpoint: str) -> Callable[[str], dict[str, float]]:
    """The answer of Hugging Face's own code to one text alone: label -> probability."""
    import transformers

    pipe: Any = transformers.pipeline("text-classification", model=checkpoint, device="cpu")
    found: dict[str, dict[str, float]] = {}

    def scores(text: str) -> dict[str, float]:
        if text not in found:
            rows = pipe(text, top_k=None, truncation=True, max_length=512)
            found[text] = {row["label"]: row["score"] for row in rows}
        return found[text]

    return scores


@pytest.fixture
def same(stock: Callable[[str], dict[str, float]]) -> Callable[[str, dict[str, Any]], None]:
    """Hold an answer to the stock model's, within float32's rounding."""

    def check(text: str, answer: dict[str, Any]) -> None:
        expected = stock(text)
        assert answer["label"] == max(expected, key=expected.__getitem__)
        assert answer["score"] == pytest.approx(expected[answer["label"]], abs=2e-5)
        if "scores" in answer:
            assert answer["scores"] == pytest.approx(expected, abs=2e-5)

    return check


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a file for a test; return its path."""

    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write
