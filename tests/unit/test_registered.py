"""What other packages' classes and hooks are is registered; the rooms below the models know none by name."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import deberta_kernels
from deberta_kernels.linear import layers
from deberta_kernels.models import position_tables, registry
from deberta_kernels.models.position_tables import projected_tables
from deberta_kernels.models.registry import Kind
from deberta_kernels.torch_state import onlookers

PACKAGE = Path(deberta_kernels.__file__).parent
MODELS_KNOW = ("adapters.", "AdapterHub", "peft")


class Layer(nn.Linear):
    """A linear layer of another package."""

    merged = True

    def forward(self, x):
        return super().forward(x)


def look(module, arguments):
    """A hook of another package."""


def test_a_registered_class_is_linear_while_it_says_so(monkeypatch):
    monkeypatch.setattr(layers, "_registered", {})
    layer = Layer(4, 3)
    assert not layers.is_linear(layer)
    layers.register_linear(__name__, "Layer", "Layer.forward", lambda layer: layer.merged)
    assert layers.is_linear(layer)
    layer.merged = False
    assert not layers.is_linear(layer)


def test_a_registered_hook_may_see_what_is_handed_over(monkeypatch):
    monkeypatch.setattr(onlookers, "_registered", [])
    layer = nn.Linear(4, 3)
    layer.register_forward_pre_hook(look)
    assert onlookers.is_watched(layer)
    onlookers.register_hooks((__name__, "look"))
    assert not onlookers.is_watched(layer)


class Attention(nn.Module):
    """What the position tables read of an attention module: 16 rows, of which 5 are in reach of 3 tokens."""

    relative_attention, share_att_key, pos_att_type = True, False, ("c2p",)
    position_buckets, max_relative_positions, num_attention_heads = -1, 8, 2

    def __init__(self):
        super().__init__()
        self.pos_key_proj, self.pos_dropout = Layer(4, 4), nn.Dropout(0.1)


def test_registered_layers_are_projected_by_rows_unless_a_gate_is_on(monkeypatch):
    def rows():
        return projected_tables(module, torch.randn(16, 4), 3, lambda layer, x: layer(x)).pos_key.shape[1]

    monkeypatch.setattr(position_tables, "_row_wise", ())
    monkeypatch.setattr(position_tables, "_gates", ())
    module = Attention()
    assert rows() == 16
    position_tables.register_row_wise(__name__, gate="gated")
    assert rows() == 5
    module.pos_key_proj.gated = True
    assert rows() == 16


@pytest.mark.parametrize("kind", Kind)
def test_every_class_has_one_row(kind):
    found = [(row.home, row.name) for row in registry.rows(kind)]
    assert found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("room", ["linear", "torch_state"])
def test_rooms_below_the_models_know_nothing_of_them(room):
    for path in sorted((PACKAGE / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in MODELS_KNOW if name in text], path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("deberta_kernels.models"), path


def test_a_module_of_no_known_class_is_refused_by_name():
    """The first row of a kind is theirs, and says so."""
    module = nn.Identity()
    assert "is not transformers' DeBERTa" in registry.row_of(module, Kind.ENCODER).refusal(module)
