"""Memory of this process, as Linux counts it."""

import sys

import pytest
import torch

from deberta_kernels.testing import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def test_what_a_call_needs_beside_its_result_is_counted():
    def call():
        large = torch.ones(16 << 20)  # 64 MiB
        return [large[:1000].clone()]

    call()
    found = memory.peak(call)
    assert found["returned"] == 4000
    assert 56 << 20 < found["bytes"] < 80 << 20
    assert found["held_before"] > 10 << 20


def test_fields_are_bytes_and_an_unknown_one_is_named():
    assert memory.status("VmHWM") >= memory.status("VmRSS") > 1 << 20
    assert memory.free() > 1 << 20
    with pytest.raises(RuntimeError, match="has no VmNothing; memory is measured on Linux only"):
        memory.status("VmNothing")
