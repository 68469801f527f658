"""The rows of a packed batch: which batches have them, how they are laid out, and when they are laid out again."""

from __future__ import annotations

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.models.packing import Packing, find_packing


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_number_of_padding_that_is_not_zero_keeps_the_batch_padded(value, dtype):
    keep = torch.arange(9)[None] < torch.tensor([[9], [4]])
    states = torch.randn(2, 9, 6, dtype=dtype) * keep[..., None]
    states[1, 7, 3] = value
    packing = find_packing(keep, states, 0.95)
    assert (packing is None) == (bool(states[1, 7, 3] != 0))


def test_finding_a_packing_keeps_nothing_for_a_backward():
    keep = torch.arange(9)[None] < torch.tensor([[9], [4]])
    states = (torch.randn(2, 9, 6) * keep[..., None]).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert find_packing(keep, states, 0.95) is not None
    assert not kept


def test_states_are_unpacked_for_whoever_needs_them_only(build, batch, monkeypatch):
    model, mask = build(num_hidden_layers=4), batch(4, 41)["attention_mask"]
    states = torch.randn(4, 41, model.config.hidden_size) * mask[..., None]

    def last(keep: bool = False) -> torch.Tensor:
        with torch.no_grad():
            return model.encoder(states, mask, output_hidden_states=keep).last_hidden_state

    expected = last()
    dk.patch(model, strict=True)
    unpacked: list[int] = []
    unpack = Packing.unpack
    monkeypatch.setattr(Packing, "unpack", lambda self, rows: unpacked.append(len(rows)) or unpack(self, rows))
    torch.testing.assert_close(last(), expected, atol=3e-5, rtol=1e-5)
    assert len(unpacked) == 1
    torch.testing.assert_close(last(keep=True), expected, atol=3e-5, rtol=1e-5)
    assert len(unpacked) == 1 + 4
    seen: list[torch.Tensor] = []
    model.encoder.layer[2].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    torch.testing.assert_close(last(), expected, atol=3e-5, rtol=1e-5)
    assert len(unpacked) == 1 + 4 + 1
    assert seen[0].shape[:2] == (4, 41)


def test_a_packing_lays_rows_out_as_they_were():
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    states = torch.arange(1.0, 17).view(4, 4, 1) * keep[..., None]
    packing = find_packing(keep, states, 1.0)
    assert packing is not None
    for moved in (packing, packing.to("cpu")):
        assert moved.cu_seqlens.tolist() == [0, 2, 6, 8, 8]
        packed = moved.pack(states)
        assert packed.shape == (1, 8 + 3, 1)
        assert torch.equal(moved.unpack(packed), states)
        assert (moved.tokens, moved.longest, moved.contiguous) == (8, 4, True)
        values = packed + 1.0
        mean = torch.stack([moved.unpack(values)[row].mean(0) for row in (0, 2, 3)])
        torch.testing.assert_close(moved.padding_context(values), mean.unsqueeze(0))
    assert find_packing(keep, states, 0.49) is None
    assert find_packing(keep, states + 1.0, 1.0) is None
