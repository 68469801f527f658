"""Memory that was freed or cut under a tensor, as sharded training does, is never read: PyTorch runs, and says so."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels import native
from deberta_kernels.linear import hidden_dropout, products
from deberta_kernels.linear import layers as linear
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from tests.integrations.linears import states_of

pytestmark = pytest.mark.skipif(native.opened() is None, reason="the native library is not built")


GONE = re.compile("storage|not allocated")


def freed(tensor: torch.Tensor, size: int = 0) -> None:
    tensor.data.untyped_storage().resize_(size)


def untouched(*args: object, **named: object) -> None:
    pytest.fail("memory was handed over that is not there")


@pytest.mark.parametrize(("name", "size"), [("weight", 0), ("weight", 64), ("bias", 0), ("x", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_raises_as_pytorch_does(dtype, name, size, monkeypatch):
    layer, x = nn.Linear(64, 32).to(dtype).eval().requires_grad_(False), torch.randn(9, 64).to(dtype)
    assert linear._is_plain(layer, x)
    freed(x if name == "x" else layer.get_parameter(name), size)
    for way in ("_multiply", "widened"):
        monkeypatch.setattr(products, way, untouched)
    for call in (
        layer,
        lambda x: apply_linear(layer, x, everywhere=True),
        lambda x: apply_linear_gelu(layer, nn.GELU(), x, everywhere=True),
    ):
        with pytest.raises(RuntimeError, match=GONE):
            call(x)


@pytest.mark.parametrize("name", ["weight", "bias", "x"])
def test_memory_that_was_cut_is_left_to_pytorch(name):
    layer, x = nn.Linear(64, 32), torch.randn(9, 64)
    freed(x if name == "x" else layer.get_parameter(name), 64)
    assert not linear._is_plain(layer, x)


@pytest.mark.parametrize("what", ["dense", "query_proj", "key_proj", "pos_key_proj", "rel_embeddings"])
def test_a_patched_model_raises(what, build, batch):
    model, inputs = build(share_att_key=False), batch(4, 41)
    dk.patch(model, fast_linears=True)
    states_of(model, inputs)
    attention = model.encoder.layer[1].attention
    if what == "dense":
        freed(attention.output.dense.weight)
    elif what == "rel_embeddings":
        freed(model.encoder.rel_embeddings.weight)
    else:
        freed(getattr(attention.self, what).weight)
    with pytest.raises(RuntimeError, match=GONE):
        states_of(model, inputs)


@pytest.mark.parametrize("which", ["x", "weight", "dout"])
def test_memory_freed_before_the_backward_is_not_read_by_the_library(which, monkeypatch):
    layer, x, dout = nn.Linear(64, 32), torch.randn(9, 64, requires_grad=True), torch.randn(9, 32)
    y = products.natively_with_gradients(x, layer.weight, layer.bias)
    freed({"x": x, "weight": layer.weight, "dout": dout}[which])
    monkeypatch.setattr(products, "_multiply", untouched)
    with pytest.raises(RuntimeError, match=GONE):
        y.backward(dout)


@pytest.mark.parametrize("cut", ["x", "residual"])
def test_a_dropout_is_left_to_pytorch(cut):
    tensors = {"x": torch.randn(3, 500), "residual": torch.randn(3, 500)}
    assert hidden_dropout._is_plain(nn.Dropout(0.5), **tensors)
    freed(tensors[cut], 64)
    assert not hidden_dropout._is_plain(nn.Dropout(0.5), **tensors)
