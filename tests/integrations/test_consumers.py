"""Packages that run a DeBERTa, quantise its layers, or bring one of their own making; random weights."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk
from tests import needs
from tests.word_tokenizer import word_tokenizer

TEXTS = ["Anna works for Acme in Berlin", "the weather today is great and it is a very happy example", "Paris is great"]
WORDS = sorted({word for text in TEXTS for word in text.split()} | {"person", "city", "company", "This", "."})
PACKAGES = ("transformers", "torch")


@pytest.fixture
def save(build, tmp_path: Path) -> Callable[..., str]:
    """Save a small model and a tokenizer of whole words as a checkpoint; return its directory."""

    def save(head: str, **settings: Any) -> str:
        build(head, **settings).save_pretrained(tmp_path)
        word_tokenizer(WORDS, longest=64).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.fixture
def check(tables) -> Callable[..., None]:
    """Compare what a consumer computes plain, after patch, and under patch_all; report what ran.

    `model` is what users have in hand: a module, or what holds one.
    `step` is what a float32 difference in the last bit may become where a layer rounds its input to fewer bits.
    """

    def check(
        name: str,
        packages: tuple[str, ...],
        model: Any,
        run: Callable[[], Any],
        *,
        step: float = 0.0,
        table: str = "consumers",
    ) -> None:
        expected = run()
        for how in ("patch", "patch_all"):
            if how == "patch":
                for _ in range(2):  # the second time changes nothing
                    assert dk.patch(model, strict=True).patched == 2
            else:
                dk.patch_all(strict=True)
            dk.reset_stats()
            actual = run()
            torch.testing.assert_close(actual, expected, atol=max(3e-5, step), rtol=1e-4)
            assert (actual - expected).abs().mean() < 3e-5
            stats = dk.stats()
            assert sum(stats["calls"].values()) > 0
            assert stats["fallbacks"] == {}
            assert (dk.unpatch(model) > 0) == (how == "patch")
            dk.unpatch_all()
            tables.report(table, packages, name, how, "fused")
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

    check(f"pipeline, {task}", PACKAGES, pipe, lambda: torch.tensor(numbers(pipe(texts, batch_size=3, **options))))


@pytest.mark.packages("accelerate")
def test_trainers_are_fused(save, check, tmp_path):
    needs.package("accelerate")
    directory = save("DebertaV2ForSequenceClassification")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    options = transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, options, data_collator=collate)
    rows = [dict(tokenizer(text)) for text in TEXTS]
    check("Trainer", ("accelerate", *PACKAGES), trainer, lambda: torch.as_tensor(trainer.predict(rows).predictions))


@pytest.mark.packages("sentence_transformers")
def test_sentence_transformers_cross_encoder_is_fused(save, check):
    package = needs.package("sentence_transformers")
    model = package.CrossEncoder(save("DebertaV2ForSequenceClassification", num_labels=1), device="cpu")
    pairs = [(TEXTS[0], text) for text in TEXTS]
    packages = ("sentence-transformers", *PACKAGES)
    check("sentence-transformers, CrossEncoder", packages, model, lambda: torch.as_tensor(model.predict(pairs)))


@pytest.mark.packages("sentence_transformers")
def test_sentence_transformers_embeddings_are_fused(save, check):
    package = needs.package("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.models")
    transformer = modules.Transformer(save("DebertaV2Model"))
    model = package.SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")
    packages = ("sentence-transformers", *PACKAGES)
    check("sentence-transformers, SentenceTransformer", packages, model, lambda: torch.as_tensor(model.encode(TEXTS)))


@pytest.fixture
def gliner(save) -> Any:
    package = needs.package("gliner")
    torch.manual_seed(0)
    config = package.GLiNERConfig(model_name=save("DebertaV2Model"), hidden_size=32, max_width=4, dropout=0.0)
    return package.GLiNER.from_config(config, load_tokenizer=True, backbone_from_pretrained=True)


def scores(model: Any, texts: list[str] = TEXTS, **options: Any) -> torch.Tensor:
    found = model.inference(texts, ["person", "city", "company"], threshold=0.0, flat_ner=False, **options)
    assert all(found)
    spans = [sorted((e["start"], e["end"], e["label"], e["score"]) for e in entities) for entities in found]
    return torch.tensor([span[3] for entities in spans for span in entities])


@pytest.mark.packages("gliner")
def test_gliner_is_fused(gliner, check):
    check("GLiNER", ("gliner", *PACKAGES), gliner, lambda: scores(gliner))


@pytest.mark.packages("gliner")
def test_gliner_with_packed_requests_is_fused(gliner, check):
    packing = needs.package("gliner").InferencePackingConfig(max_length=64, sep_token_id=2)
    masks: list[int] = []
    encoder = next(module for module in gliner.modules() if type(module).__name__ == "DebertaV2Encoder")
    encoder.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1].dim()))
    check("GLiNER, packed requests", ("gliner", *PACKAGES), gliner, lambda: scores(gliner, packing_config=packing))
    assert set(masks) == {3}


@pytest.mark.packages("gliner")
@pytest.mark.parametrize("how", ["patch", "patch_all"])
def test_compiled_gliner_is_fused(how, gliner, tables, monkeypatch):
    texts = [TEXTS, TEXTS[:1]]
    expected = [scores(gliner, some) for some in texts]
    if how == "patch":
        dk.patch(gliner, strict=True)
    else:
        dk.patch_all(strict=True)
    # What is traced is the same with Inductor, whose C++ takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gliner.compile()  # with dynamic shapes
    for some, before in zip(texts, expected, strict=True):
        dk.reset_stats()
        torch.testing.assert_close(scores(gliner, some), before, atol=3e-5, rtol=1e-4)
        assert sum(dk.stats()["calls"].values()) == 2
        assert dk.stats()["fallbacks"] == {}
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert "deberta_kernels" not in str(counters["graph_break"])
    torch._dynamo.reset()
    tables.report("consumers", ("gliner", *PACKAGES), "GLiNER, compile()", how, "fused")


PERSONS = {"num_labels": 2, "id2label": {0: "PERSON", 1: "LOCATION"}, "label2id": {"PERSON": 0, "LOCATION": 1}}


@pytest.mark.packages("presidio_analyzer")
def test_presidio_recognizer_is_fused(save, check):
    needs.package("presidio_analyzer")
    ner = importlib.import_module("presidio_analyzer.predefined_recognizers.ner.huggingface_ner_recognizer")
    recognizer = ner.HuggingFaceNerRecognizer(
        model_name=save("DebertaV2ForTokenClassification", **PERSONS), threshold=0.0, device="cpu"
    )
    recognizer.load()

    def run() -> torch.Tensor:
        return torch.tensor([found.score for found in recognizer.analyze(TEXTS[1], ["PERSON", "LOCATION"])])

    packages = ("presidio-analyzer", *PACKAGES)
    check("Presidio, HuggingFaceNerRecognizer", packages, recognizer, run)


@pytest.mark.packages("presidio_analyzer")
def test_presidio_engine_is_fused(save, check, tmp_path_factory):
    engines = needs.package("presidio_analyzer.nlp_engine")
    language = str(tmp_path_factory.mktemp("spacy"))
    needs.package("spacy").blank("en").to_disk(language)
    names = {"spacy": language, "transformers": save("DebertaV2ForTokenClassification", **PERSONS)}
    engine = engines.TransformersNlpEngine(
        models=[{"lang_code": "en", "model_name": names}],
        ner_model_configuration=engines.NerModelConfiguration(labels_to_ignore=[]),
    )
    engine.load()
    component = engine.nlp["en"].pipeline[-1][1]

    def run() -> torch.Tensor:
        return torch.tensor(engine.process_text(TEXTS[1], "en").scores)

    check("Presidio, TransformersNlpEngine", ("presidio-analyzer", "spacy", *PACKAGES), component, run)


@pytest.mark.packages("spacy_transformers")
def test_spacy_transformers_is_fused(save, check):
    needs.package("spacy_transformers")
    nlp = needs.package("spacy").blank("en")
    spans = {"@span_getters": "spacy-transformers.doc_spans.v1"}
    architecture = "spacy-transformers.TransformerModel.v3"
    nlp.add_pipe(
        "transformer",
        config={"model": {"@architectures": architecture, "name": save("DebertaV2Model"), "get_spans": spans}},
    )
    nlp.initialize()

    def run() -> torch.Tensor:
        states = [doc._.trf_data.model_output.last_hidden_state for doc in nlp.pipe(TEXTS)]
        return torch.cat([torch.as_tensor(state) for state in states])

    component = nlp.get_pipe("transformer")
    packages = ("spacy-transformers", "spacy", *PACKAGES)
    check("spaCy, spacy-transformers", packages, component, run, table="consumers-spacy")


QUANTISED = {
    "bitsandbytes, 8 bits": ("bitsandbytes", {"load_in_8bit": True}),
    "bitsandbytes, 4 bits": ("bitsandbytes", {"load_in_4bit": True}),
    "torchao, int8 weights": ("torchao", "Int8WeightOnlyConfig"),
    "torchao, float8 weights": ("torchao", "Float8WeightOnlyConfig"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.packages(package)) for name, (package, _) in QUANTISED.items()]
)
def test_quantised_layers_are_called_as_modules(name, save, check, batch):
    package, setting = QUANTISED[name]
    needs.package(package)
    directory = save("DebertaV2Model", hidden_size=64, intermediate_size=64)
    plain = transformers.DebertaV2Model.from_pretrained(directory).eval()
    if package == "bitsandbytes":
        model = transformers.DebertaV2Model.from_pretrained(
            directory, quantization_config=transformers.BitsAndBytesConfig(**setting), device_map="cpu"
        ).eval()
    else:
        quantization = importlib.import_module("torchao.quantization")
        model = copy.deepcopy(plain)
        quantization.quantize_(model, getattr(quantization, setting)())
    layers = [type(layer.attention.self.key_proj.weight) for layer in model.encoder.layer]
    assert torch.nn.Parameter not in layers
    inputs = batch(3, 37)

    def run(one: Any = model) -> torch.Tensor:
        with torch.no_grad():
            return one(**inputs).last_hidden_state

    assert not torch.allclose(run(), run(plain), atol=1e-3)
    # bitsandbytes rounds to half precision inside its layers.
    step = 2**-8 * run().abs().max().item() if package == "bitsandbytes" else 0.0
    check(name, (package, *PACKAGES), model, run, step=step)
