"""Hugging Face's Trainer trains a patched model along the same losses, with every setting people change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deberta_kernels as dk

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "default checkpoints": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True},
}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no test inherit the precision of the one before: accelerate keeps it, transformers 4.57 exports it."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in torch.randint(4, 30, (32,), generator=generator).tolist():
        ids = torch.randint(3, 64, (length,), generator=generator)
        found.append({"input_ids": ids, "labels": int(ids[1] > 32)})
    return found


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in batch], batch_first=True)
    labels = torch.tensor([sample["labels"] for sample in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def losses(model: Any, samples: list[dict[str, Any]], folder: Any, **settings: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-3, logging_steps=1, seed=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, optim="adamw_torch", **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_of_the_unpatched_model(name, samples, build, tmp_path):
    found = []
    for patched in (False, True):
        model = build("DebertaV2ForSequenceClassification")
        if patched:
            dk.patch(model, strict=True)
        settings = SETTINGS[name] if patched or "checkpoint" not in name else {}
        found.append(torch.tensor(losses(model, samples, tmp_path, **settings)))
    assert found[0].shape == (STEPS,)
    # The log rounds to four digits.
    torch.testing.assert_close(found[1], found[0], atol=0.03 if name == "bfloat16" else 2e-4, rtol=0)
    assert len(set(found[1].tolist())) == STEPS


def test_a_trained_model_saves_and_loads_without_this_package(samples, build, tmp_path):
    from transformers import DebertaV2ForSequenceClassification

    model, batch = build("DebertaV2ForSequenceClassification"), collate(samples[:3])
    dk.patch(model, strict=True)
    losses(model, samples, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    loaded = DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, atol=1e-4, rtol=1e-4)
