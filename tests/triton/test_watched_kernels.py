"""The tools that watch kernels are told their names: every kernel that a call launches must be among them."""

import pytest

from tests import needs

needs.package("triton")

from offline.variants import FULL, Variant, kernel_title, launches, selection

from benchmarks.gpu.profilers import KERNELS


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_kernel_is_watched(direction):
    variant = Variant("sm_90", direction, "bf16", 64, FULL)
    names = {launch.kernel.__name__ for launch in launches(variant)}
    assert names
    assert [name for name in names if not any(part in name for part in KERNELS)] == []


def test_every_selected_variant_can_be_planned():
    titles = set()
    for variant in selection(oldest=False):
        for launch in launches(variant):
            titles.add((variant.chip, kernel_title(variant, launch)))
            missing = set(launch.kernel.arg_names) - launch.arguments.keys() - launch.constants.keys()
            assert missing == set()
    assert {chip for chip, _ in titles} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
