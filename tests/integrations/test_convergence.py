"""A patched model learns what the stock model learns, step by step, and does not grow while it does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import deberta_kernels as dk

STEPS, TWINS = 20, 5


def losses(model: Any, inputs: list[dict[str, torch.Tensor]], bfloat16: bool) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(**inputs[step % len(inputs)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("fast_linears", [False, True])
def test_losses_stay_as_close_as_those_of_weights_moved_by_a_ten_millionth(bfloat16, fast_linears, build, batch):
    model = build("DebertaV2ForSequenceClassification", num_hidden_layers=3, num_labels=4).train()
    inputs = []
    for length in (24, 37, 12, 30):
        found = batch(8, length)
        inputs.append({**found, "labels": found["input_ids"][:, 1] % 4})
    expected = losses(copy.deepcopy(model), inputs, bfloat16)
    gaps = []
    for seed in range(TWINS):
        twin = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1e-7 * torch.randn(parameter.shape, generator=generator))
        gaps.append((losses(twin, inputs, bfloat16) - expected).abs().max())
    dk.patch(model, strict=True, fast_linears=fast_linears)
    gap = (losses(model, inputs, bfloat16) - expected).abs().max()
    assert expected[-4:].mean() < 0.9 * expected[:4].mean()
    assert 0 < gap <= 3 * max(gaps)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_resident_memory_does_not_grow_with_steps_of_random_lengths(monkeypatch):
    from benchmarks.training import soak

    monkeypatch.setattr(soak, "LONGEST", 40)
    monkeypatch.setattr(soak, "WARM_UP", 0.5)
    # Over so few steps the allocator still moves by pages. A leak of one state a step would be about 12 KiB a step.
    assert soak.growth(1400) <= 4.0
