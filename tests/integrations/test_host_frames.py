"""What a layer of a patched model costs beside its kernels, counted: it does not grow again unnoticed."""

from __future__ import annotations

import pytest

from benchmarks.host import frames
from tests import needs

needs.native_library()


@pytest.mark.parametrize(("mode", "most"), [("eval", 120), ("ragged", 150), ("training", 130)])
def test_a_layer_enters_few_functions_of_this_package(mode, most):
    found = frames.frames(mode, most=300)
    assert found.package <= most, found.top
    assert found.total > found.package
    assert sum(count for _, count in found.top) == pytest.approx(found.package)


def test_times_are_taken():
    assert 0 < frames.packing_decision_time() < frames.forward_time("ragged") * 2
