"""Tiny random checkpoints where Hugging Face's libraries keep their downloads, under the names that documents use.

Every library, and every process that a document starts, finds them there as it would find the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deberta_kernels.demo.text import paragraphs
from deberta_kernels.testing import geometries

__all__ = ["publish"]

_COMMIT = "0" * 40
# What is in the name of a checkpoint that was trained for a task: its head, and its labels. Others are pretrained ones.
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nli": ("SequenceClassification", ("entailment", "neutral", "contradiction")),
    "zeroshot": ("SequenceClassification", ("entailment", "not_entailment")),
    "sst": ("SequenceClassification", ("negative", "positive")),
    "sentiment": ("SequenceClassification", ("negative", "neutral", "positive")),
    "rerank": ("SequenceClassification", ("score",)),
    "marco": ("SequenceClassification", ("score",)),
    "ner": ("TokenClassification", ("O", "B-PER", "I-PER")),
    "squad": ("QuestionAnswering", ("start", "end")),
}
_SPECIAL = {
    "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"
}  # fmt: skip


def publish(name: str, home: Path) -> None:
    """Write a checkpoint with its tokenizer as if it had been downloaded.

    Args:
        name: "owner/name"; what is in it says which head the checkpoint has, and whether it is DeBERTa v1.
        home: what HF_HOME will be.
    """
    import transformers

    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / _COMMIT
    if snapshot.exists():
        return
    tokenizer = _tokenizer(transformers)
    head, labels = next((found for word, found in _TASKS.items() if word in name.lower()), ("MaskedLM", ("0", "1")))
    short = name.rpartition("/")[2].lower()
    v1 = short.startswith("deberta-") and not short.startswith(("deberta-v2", "deberta-v3"))
    version = "Deberta" if v1 else "DebertaV2"
    settings: dict[str, Any] = geometries.settings("tiny", vocab_size=len(tokenizer), position_buckets=256)
    settings |= {"max_position_embeddings": 512, "id2label": dict(enumerate(labels))}
    settings |= {"label2id": {label: number for number, label in enumerate(labels)}}
    if v1:
        settings.pop("position_buckets")
    torch.manual_seed(0)
    model = getattr(transformers, f"{version}For{head}")(getattr(transformers, f"{version}Config")(**settings))
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(_COMMIT, encoding="ascii")


def _tokenizer(transformers: Any) -> Any:
    """Return a tokenizer with the special tokens of DeBERTa, trained on the text that comes with the package."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(paragraphs(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, model_input_names=["input_ids", "attention_mask"], **_SPECIAL
    )
