"""No sum of a packed batch is left to the order in which a GPU's atomic additions happen to come."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deberta_kernels.models.packing import find_packing
from deberta_kernels.models.padding_gradient import PackedLayer

pytestmark = pytest.mark.no_kernels

# Operators that add through an index, and which of their arguments that is.
ADDING = {"index_add": 2, "index_add_": 2, "scatter_add": 2, "scatter_add_": 2, "_embedding_bag": 1}


class Additions(TorchDispatchMode):
    """The operators that add more than once to one place: atomically, on a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.names = [], set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.removeprefix("aten::")
        self.names.add(name)
        if name in ADDING:
            index = arguments[ADDING[name]]
            if index.unique().numel() < index.numel():
                self.found.append(name)
        accumulates = name in ("index_put_", "index_put", "_index_put_impl_") and len(arguments) > 3 and arguments[3]
        if accumulates or name in ("embedding_dense_backward", "scatter_reduce", "index_reduce_", "put_"):
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("padding", ["right", "holes", "sample"])
def test_packing_adds_in_one_order(build, batch, padding):
    layer = copy.deepcopy(build()).encoder.layer[0]
    keep = batch(4, 41, padding)["attention_mask"].bool()
    states = (torch.randn(4, 41, 32) * keep[..., None]).requires_grad_()
    packed = PackedLayer(layer, find_packing(keep, states, 1.0), None)
    with Additions() as seen:
        rows = packed.pack(states)
        context = packed.packing.padding_context(rows)
        out = torch.cat([rows[:, : packed.packing.tokens], context], 1)
        padded = packed.unpack(out)
        padded.backward(torch.randn_like(padded))
    assert packed.deviation is not None
    assert {"index_select", "segment_reduce"} <= seen.names
    assert seen.found == []


def test_sums_of_padding_are_those_of_each_sample(batch):
    keep = batch(4, 41, "holes")["attention_mask"].bool()
    packing = find_packing(keep, torch.zeros(4, 41, 3), 1.0)
    values = torch.randn(4, 41, 3, dtype=torch.float64)
    found = packing.sum_padding(values)[0]
    short = [i for i in range(4) if not keep[i].all()]
    expected = torch.stack([values[i][~keep[i]].sum(0) for i in short])
    assert torch.equal(found[: packing.tokens], values[keep])
    torch.testing.assert_close(found[packing.tokens :], expected)
