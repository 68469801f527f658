"""Tests of one variant share a process."""

from types import SimpleNamespace

import pytest

from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels import problems
from tests.ptx.sharing import make_scheduler, variant


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_x[sm_80-B2-N130-H1-D64-bf16-c2p+p2c-holes]", "sm_80 D64 bf16 True tokens False"),
        ("test_x[B2-N130-H1-D40-fp16-none-left_tokens-triton_sm_90_on_ptx]", "sm_90 D40 fp16 False tokens False"),
        ("test_x[sm_90-B2-N9-H1-D64-fp32-p2c-sparse+holes-dropout0.2]", "sm_90 D64 fp32 True pairs True"),
        ("test_x[sm_90-B2-N9-H1-D64-fp32-p2c-heads_first]", "sm_90 D64 fp32 True unmasked False"),
        ("test_x[B2-N9-H1-D64-fp32-p2c-heads]", None),
        ("test_devices_are_told_apart", None),
    ],
)
def test_a_variant_is_told_by_the_name_of_a_test(name, expected):
    assert variant(name) == expected


def test_names_and_cases_agree_about_variants():
    """What the kernels are asked for, as the operators count it."""
    found = {}
    for case in (*problems.GENERAL, *problems.every_case(), Case(mask="right", dropout_p=0.5)):
        mask = "pairs" if case.mask in problems.PAIR_MASKS else "tokens" if case.mask != "none" else "unmasked"
        features = (case.dtype, case.head_dim, case.terms != "none", mask, case.dropout_p > 0)
        found.setdefault(variant(f"test_x[sm_90-{case.id}]"), set()).add(features)
    assert None not in found
    assert all(len(features) == 1 for features in found.values())


class Process:
    """One process of pytest-xdist, which notes what it is given."""

    def __init__(self):
        self.given, self.shutting_down, self.gateway = [], False, SimpleNamespace(id="gw", spec=None)

    def send_runtest_some(self, indices):
        self.given += indices

    def shutdown(self):
        self.shutting_down = True


def test_a_process_is_given_a_whole_variant():
    pytest.importorskip("xdist")
    tests = [f"test_x[sm_90-B1-N{n}-H1-D{d}-bf16-none]" for n in range(3) for d in (64, 32)]
    options = SimpleNamespace(loadscopereorder=True)
    config = SimpleNamespace(option=options, getvalue=lambda name: ["popen", "popen"])
    scheduler = make_scheduler(config, None)
    processes = [Process(), Process()]
    for process in processes:
        scheduler.add_node(process)
        scheduler.add_node_collection(process, tests)
    scheduler.schedule()
    assert sorted(sorted(process.given) for process in processes) == [[0, 2, 4], [1, 3, 5]]
