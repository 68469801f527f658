"""How often the forward of a whole patched model waits for a GPU: at most once, and never without packing.

A stand-in for the driver takes the launches. Its tensors are of the CPU; what reads a value, or copies one from the
host, is counted, as each of these waits for a device.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from ptx.drivers import triton_driver
from transformers import DebertaV2Config, DebertaV2Model

import deberta_kernels as dk
from deberta_kernels import api
from deberta_kernels.models import encoder, packing, position_tables
from deberta_kernels.testing import geometries

CALLED = {
    "tolist", "item", "nonzero", "cpu", "cuda", "numpy", "masked_select", "unique", "tensor", "as_tensor", "from_numpy",
}  # fmt: skip
CONVERTED = ("__bool__", "__int__", "__float__", "__index__")


class Idle(triton_driver.Device):
    """A device that launches nothing, and counts."""

    launches = 0

    def launch(self, key, grid, arguments):
        self.launches += 1


@contextmanager
def waits():
    """Count what waits for a device: functions by Python's profiler, which does not see conversions."""
    found = Counter()

    def profile(frame, event, called):
        if event == "c_call" and called.__name__ in CALLED:
            found[called.__name__] += 1

    def counting(name, convert):
        def counted(x):
            found[name] += 1
            return convert(x)

        return counted

    with ExitStack() as stack:
        for name in CONVERTED:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting(name, getattr(torch.Tensor, name))))
        sys.setprofile(profile)
        stack.callback(sys.setprofile, None)
        yield found


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DebertaV2Model(DebertaV2Config(**geometries.settings("tiny"))).to(torch.bfloat16).eval()


@pytest.fixture
def device(monkeypatch):
    """A device: what the host may read of a CPU's tensors for nothing is not read."""
    monkeypatch.setattr(encoder, "_read", lambda states, mask: encoder._Values.UNKNOWN)
    monkeypatch.setattr(position_tables, "_content_keys", lambda tensors: None)
    monkeypatch.setattr(api, "check_cu_seqlens", lambda bounds, q, tokens, longest: (bounds, longest))
    with triton_driver.standing_in(Idle(90)) as device:
        yield device
        dk.unpatch_all()


def mask_of(kind):
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[1:, 12:] = 0
    return {"float": mask.float(), "long": mask, "bool": mask.bool(), "full": torch.ones_like(mask)}[kind]


@pytest.mark.parametrize("unpad", ["auto", False])
@pytest.mark.parametrize("kind", ["float", "long", "bool", "full"])
def test_a_forward_waits_once_at_most(model, device, kind, unpad):
    dk.patch(model, backend="triton", unpad=unpad, fast_linears=False, strict=True)
    inputs = {"input_ids": torch.ones(4, 40, dtype=torch.long), "attention_mask": mask_of(kind)}
    packed = mock.Mock(wraps=packing.find_packing)
    with torch.no_grad(), mock.patch.object(encoder, "find_packing", packed):
        model(**inputs)  # compiles, and puts the tables of distances on the device
        device.launches = 0
        with waits() as found:
            model(**inputs)
    assert found == ({} if unpad is False else {"tolist": 1})
    assert device.launches >= model.config.num_hidden_layers
    assert packed.call_count == (0 if unpad is False else 2)


def test_a_copy_from_the_host_is_counted():
    with waits() as found:
        x = torch.tensor([1, 2])
        assert bool(x.all())
        assert x.tolist() == [1, 2]
    assert found == {"tensor": 1, "__bool__": 1, "tolist": 1}
