"""Packages that bring a DeBERTa of their own making: pipelines, sentence-transformers, GLiNER; random weights."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk

TEXTS = ["Anna works for Acme in Berlin", "the weather today is great and it is a very happy example", "Paris is great"]
WORDS = sorted({word for text in TEXTS for word in text.split()} | {"person", "city", "company", "This", "."})
PACKAGES = ("transformers", "torch")


def need(package: str) -> Any:
    """Import a package that most environments lack; skip without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            package, reason=f"{package} is not installed, or does not import", exc_type=ImportError
        )


@pytest.fixture
def save(build, tmp_path: Path) -> Callable[..., str]:
    """Save a small model and a tokenizer of whole words as a checkpoint; return its directory."""

    def save(head: str, **settings: Any) -> str:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
            mask_token="[MASK]", model_max_length=64, model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip
        build(head, **settings).save_pretrained(tmp_path)
        fast.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.fixture
def check(tables) -> Callable[..., None]:
    """Compare what a consumer computes plain, after patch, and under patch_all; report what ran."""

    def check(name: str, packages: tuple[str, ...], model: torch.nn.Module, run: Callable[[], Any]) -> None:
        expected = run()
        for how in ("patch", "patch_all"):
            if how == "patch":
                assert dk.patch(model, strict=True).patched == 2
            else:
                dk.patch_all(strict=True)
            dk.reset_stats()
            torch.testing.assert_close(run(), expected, atol=3e-5, rtol=1e-4)
            stats = dk.stats()
            assert sum(stats["calls"].values()) > 0
            assert stats["fallbacks"] == {}
            dk.unpatch(model)
            dk.unpatch_all()
            tables.report("consumers", packages, name, how, "fused")
        torch.testing.assert_close(run(), expected, atol=0, rtol=0)

    return check


TASKS = {
    "text-classification": ("DebertaV2ForSequenceClassification", {}),
    "token-classification": ("DebertaV2ForTokenClassification", {}),
    "fill-mask": ("DebertaV2ForMaskedLM", {}),
    "zero-shot-classification": (
        "DebertaV2ForSequenceClassification",
        {"num_labels": 3, "label2id": {"entailment": 0, "neutral": 1, "contradiction": 2}},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines_are_fused(task, save, check):
    head, settings = TASKS[task]
    pipe = transformers.pipeline(task, model=save(head, **settings), device="cpu")
    texts = [text.replace("great", "[MASK]") for text in TEXTS[1:]] if task == "fill-mask" else TEXTS
    options = {"candidate_labels": ["person", "city"]} if task.startswith("zero") else {}

    def numbers(found: Any) -> list[float]:
        if isinstance(found, dict):
            return [float(x) for key in ("score", "scores") for x in torch.as_tensor(found.get(key, [])).flatten()]
        return [x for one in found for x in numbers(one)]

    check(
        f"pipeline, {task}", PACKAGES, pipe.model, lambda: torch.tensor(numbers(pipe(texts, batch_size=3, **options)))
    )


def test_sentence_transformers_cross_encoder_is_fused(save, check):
    package = need("sentence_transformers")
    model = package.CrossEncoder(save("DebertaV2ForSequenceClassification", num_labels=1), device="cpu")
    pairs = [(TEXTS[0], text) for text in TEXTS]
    packages = ("sentence-transformers", *PACKAGES)
    check("sentence-transformers, CrossEncoder", packages, model, lambda: torch.as_tensor(model.predict(pairs)))


def test_sentence_transformers_embeddings_are_fused(save, check):
    package = need("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.models")
    transformer = modules.Transformer(save("DebertaV2Model"))
    model = package.SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")
    packages = ("sentence-transformers", *PACKAGES)
    check("sentence-transformers, SentenceTransformer", packages, model, lambda: torch.as_tensor(model.encode(TEXTS)))


@pytest.fixture
def gliner(save) -> Any:
    package = need("gliner")
    torch.manual_seed(0)
    config = package.GLiNERConfig(model_name=save("DebertaV2Model"), hidden_size=32, max_width=4, dropout=0.0)
    return package.GLiNER.from_config(config, load_tokenizer=True, backbone_from_pretrained=True)


def scores(model: Any, **options: Any) -> torch.Tensor:
    found = model.inference(TEXTS, ["person", "city", "company"], threshold=0.0, flat_ner=False, **options)
    assert all(found)
    spans = [sorted((e["start"], e["end"], e["label"], e["score"]) for e in entities) for entities in found]
    return torch.tensor([span[3] for entities in spans for span in entities])


def test_gliner_is_fused(gliner, check):
    check("GLiNER", ("gliner", *PACKAGES), gliner, lambda: scores(gliner))


def test_gliner_with_packed_requests_is_fused(gliner, check):
    packing = need("gliner").InferencePackingConfig(max_length=64, sep_token_id=2)
    masks: list[int] = []
    encoder = next(module for module in gliner.modules() if type(module).__name__ == "DebertaV2Encoder")
    encoder.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1].dim()))
    check("GLiNER, packed requests", ("gliner", *PACKAGES), gliner, lambda: scores(gliner, packing_config=packing))
    assert set(masks) == {3}
