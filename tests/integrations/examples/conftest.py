"""The programs of examples/, and small checkpoints for them to begin with."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deberta_kernels.testing import geometries

EXAMPLES = Path(__file__).parents[3] / "examples"
WORDS = (
    *("a", "an", "of", "the", "very", "small", "big", "good", "bad", "film", "house", "text", "anna", "acme"),
    *("berlin", "works", "for", "in", "how", "is", "it", "what", "person", "city", "after"),
)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import one of the examples by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Save a tiny model and a tokenizer of whole words; return the folder: checkpoint(head, **config)."""

    def checkpoint(head: str = "DebertaV2Model", **settings: Any) -> str:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        folder = tmp_path_factory.mktemp("checkpoint")
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
            mask_token="[MASK]", model_max_length=64, model_input_names=["input_ids", "attention_mask"],
        ).save_pretrained(folder)  # fmt: skip
        torch.manual_seed(0)
        cls = getattr(transformers, head)
        cls(cls.config_class(**geometries.settings("tiny", initializer_range=0.2, **settings))).save_pretrained(folder)
        return str(folder)

    return checkpoint


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """Write a CSV file: table(header, *rows)."""

    def table(*rows: tuple[Any, ...], name: str = "rows.csv") -> str:
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",").writerows(rows)
        return str(tmp_path / name)

    return table


@pytest.fixture
def json_lines(tmp_path: Path) -> Callable[[list[Any]], str]:
    """Write a file of JSON lines."""

    def json_lines(rows: list[Any]) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / "rows.jsonl")

    return json_lines


@pytest.fixture
def train(program: Callable[[str], Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a training example; return what it wrote into results.json."""

    def train(name: str, *arguments: str, output: str = "output") -> dict[str, Any]:
        folder = tmp_path / output
        options = ["--device", "cpu", "--comparison-seconds", "0", *arguments]
        assert importlib.import_module("parts.recipe").run(program(name).TASK, [*options, "--output", str(folder)]) == 0
        return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))

    return train
