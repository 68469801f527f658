"""The CUDA kernels as nvcc compiles them, executed: the package's launches over libcuda's functions."""

import random
from dataclasses import replace

import pytest
import torch
from ptx.drivers import cuda_driver, cuda_modules

from deberta_kernels.impl import cuda
from deberta_kernels.impl.cuda import image
from deberta_kernels.impl.cuda.modules import HEAD_DIMS
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels import problems
from tests.ptx.kernels.problems import BF16, FAR, FEW_KEYS, FP16, GENERAL, SHORT

CASES = [
    *GENERAL,
    *FEW_KEYS,
    *(replace(case, dtype=FP16) for case in GENERAL[4::6]),
    replace(FAR, dtype=FP16),
    *(Case(batch=1, heads=1, nq=n, head_dim=128, dtype=BF16, **SHORT) for n in (65, 330)),
    Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, head_dim=128, dtype=FP16, mask="heads", dropout_p=0.2),
    Case(batch=3, heads=1, nq=150, head_dim=128, dtype=BF16, packed=True, **SHORT),
    Case(batch=1, heads=1, nq=300, dtype=FP16, position_buckets=0, max_relative_positions=40),
    Case(batch=1, heads=2, nq=260, nk=40, dtype=FP16, **SHORT),
    *(Case(batch=1, heads=1, nq=150, dtype=dtype, spread=spread) for dtype, spread in
      ((FP16, 8.0), (FP16, 30.0), (BF16, 30.0), (BF16, 200.0))),
]  # fmt: skip
EVERY_CASE = [c for c in problems.every_case() if c.dtype in image.DTYPES and c.head_dim in HEAD_DIMS["forward"]]
# Warpgroup 0 produces, the others consume.
WARPGROUPS = [range(4 * group, 4 * group + 4) for group in range(3)]
LATE = [
    Case(batch=1, heads=1, nq=330, dtype=BF16, **SHORT),
    Case(batch=2, heads=1, nq=260, dtype=FP16, mask="holes", dropout_p=0.1, **SHORT),
]


@pytest.fixture(scope="module")
def device():
    with cuda_driver.installed(cuda_driver.Device()) as device:
        yield device


@pytest.fixture(autouse=True)
def in_order(device):
    """Start every test with the same order of warps."""
    device.seed, device.late = 0, ()


def random_case(seed: int) -> Case:
    draw = random.Random(seed).choice
    packed = draw((False, False, False, True))
    nq, prefix = draw((1, 17, 64, 65, 100, 128, 129, 200)), 0 if packed else draw((0, 0, 1, 16, 63, 64, 65))
    mask = "none" if packed else draw(inputs.MASKS)
    buckets, most = draw(((256, 512), (16, 64), (4, 8), (0, 40), (0, 1)))
    nk = None if packed else draw((nq, 30, 150)) + prefix
    if nk != nq:
        mask = mask.removesuffix("_tokens")
    return Case(
        batch=draw((1, 2, 3)), heads=draw((1, 2)), nq=nq, nk=nk, head_dim=draw((64, 64, 128)),
        dtype=draw((BF16, FP16)), terms=draw(inputs.TERMS), position_buckets=buckets, max_relative_positions=most,
        prefix_length=prefix, mask=mask, layout=draw(inputs.LAYOUTS), spread=draw((1.0, 3.0, 30.0)),
        dropout_p=draw((0.0, 0.0, 0.3)), reachable=draw((False, True)), packed=packed, seed=seed,
    )  # fmt: skip


def named(cases):
    return [pytest.param(c, id=c.id) for c in cases]


@pytest.mark.parametrize("case", named(CASES))
def test_results_and_gradients_are_within_the_budget(device, check, case):
    check("cuda", case, backward=case.head_dim in HEAD_DIMS["backward"])


@pytest.mark.parametrize("case", named([random_case(seed) for seed in range(24)]))
def test_random_results_are_within_the_budget(device, check, case):
    check("cuda", case, backward=False)


@pytest.mark.parametrize("case", named([*LATE, *CASES[-12::2]]))
def test_deterministic_gradients_are_within_the_budget(device, check, case):
    torch.use_deterministic_algorithms(True)
    try:
        check("cuda", case, backward=case.head_dim in HEAD_DIMS["backward"])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("group", range(3))
@pytest.mark.parametrize("case", named(LATE))
def test_a_warpgroup_may_fall_behind(device, check, case, group):
    device.seed, device.late = 7 * group, tuple(WARPGROUPS[group])
    check("cuda", case)


@pytest.mark.every_case
@pytest.mark.parametrize("case", named(EVERY_CASE))
def test_every_case_of_the_gpu_program(device, check, case):
    check("cuda", case, backward=case.head_dim in HEAD_DIMS["backward"])


if others := cuda_modules.compilers()[1:]:

    @pytest.mark.parametrize("compiler", others)
    @pytest.mark.parametrize("case", named(LATE))
    def test_other_compilers_make_kernels_that_are_right_too(check, case, compiler):
        with cuda_driver.installed(cuda_driver.Device(compiler)):
            check("cuda", case)


def test_a_deterministic_backward_gives_the_same_bits_in_every_order(device):
    problem = inputs.problem(LATE[0])
    dout, found = inputs.dout(LATE[0], problem), []
    out, lse = cuda.forward(problem)
    torch.use_deterministic_algorithms(True)
    try:
        for seed, late in ((0, ()), (5, (0,)), (9, (8, 9, 10, 11))):
            device.seed, device.late = seed, late
            found.append(cuda.backward(problem, dout, None, out, lse, (True,) * 5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS["forward"])
def test_staging_meets_no_bank_twice(device, check, head_dim):
    check("cuda", replace(LATE[0], head_dim=head_dim), backward=False)
    machine = device.machines[f"disentangled_forward_bf16_d{head_dim}"]
    for access in ("st.shared.b16", "ld.shared.b32"):
        rows = [i for i, opcode in enumerate(machine.program.opcodes) if opcode == access]
        executed, wavefronts, needed, *_ = machine.counts[rows].sum(0)
        assert executed > 0
        assert wavefronts == needed
