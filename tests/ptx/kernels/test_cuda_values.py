"""What the CUDA kernels promise of values beyond the error budget: NaN, padding, lengths, the order of warps."""

from dataclasses import replace

import pytest
import torch
from ptx.drivers import cuda_driver

from deberta_kernels.impl import cuda
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.cuda_launches import with_gaps
from tests.ptx.kernels.problems import BF16, SHORT

NAMES = ("dq", "dk", "dv", "dpos_key", "dpos_query")


@pytest.fixture(scope="module")
def loaded():
    with cuda_driver.installed(cuda_driver.Device()) as device:
        yield device


@pytest.fixture
def device(loaded):
    loaded.seed, loaded.late = 0, ()
    return loaded


def gradients(problem, dout, *, deterministic=True, forward=None):
    out, lse = forward or cuda.forward(problem)
    torch.use_deterministic_algorithms(deterministic)
    try:
        return dict(zip(NAMES, cuda.backward(problem, dout, None, out, lse, (True,) * 5), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def poisoned(problem, tokens):
    """Return the problem with NaN in the padding."""
    changed = {}
    for name in ("q", "k", "v"):
        changed[name] = getattr(problem, name).clone()
        changed[name].transpose(1, 2)[~tokens] = float("nan")
    return replace(problem, **changed)


@pytest.mark.parametrize("case", [
    Case(batch=2, heads=1, nq=130, dtype=BF16, mask="holes_tokens"),
    Case(batch=2, heads=1, nq=260, dtype=BF16, mask="right_tokens", **SHORT),
    Case(batch=1, heads=1, nq=130, head_dim=128, dtype=BF16, mask="holes_tokens"),
], ids=lambda case: case.id)  # fmt: skip
def test_nan_in_padding_stays_there(device, case):
    problem = inputs.problem(case)
    tokens = problem.masks.key
    out, lse = cuda.forward(problem)
    found, found_lse = cuda.forward(poisoned(problem, tokens))
    real = tokens[:, None].expand(lse.shape)
    assert torch.equal(found[real], out[real])
    assert torch.equal(found_lse, lse)


def test_nan_in_padding_reaches_no_gradient(device):
    case = Case(batch=2, heads=1, nq=130, dtype=BF16, mask="holes_tokens")
    problem = inputs.problem(case)
    dout, tokens, forward = inputs.dout(case, problem), problem.masks.key, cuda.forward(problem)
    clean = gradients(problem, dout, forward=forward)
    found = gradients(poisoned(problem, tokens), dout, forward=forward)
    for name in ("dpos_key", "dpos_query"):
        assert torch.equal(found[name], clean[name]), name
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name].transpose(1, 2)[tokens], clean[name].transpose(1, 2)[tokens]), name


def test_nan_in_a_real_token_is_not_hidden_and_stays_in_its_sequence(device):
    problem = inputs.problem(Case(batch=3, heads=1, nq=100, dtype=BF16, packed=True))
    start, stop = problem.cu_seqlens[1:3].tolist()
    v = problem.v.clone()
    v[:, :, stop - 1] = float("nan")
    out, _ = cuda.forward(replace(problem, v=v))
    assert out[:, :, start:stop].isnan().all()
    assert out[:, :, :start].isfinite().all()
    assert out[:, :, stop:].isfinite().all()


def test_tiles_without_a_valid_key_are_skipped(device):
    """What a skipped tile holds is never read: NaN there changes no bit."""
    problem = with_gaps(Case(batch=1, heads=1, nq=300, dtype=BF16, **SHORT), (64, 128), (192, 300))
    changed = {name: getattr(problem, name).clone() for name in ("k", "v")}
    for x in changed.values():
        x[:, :, 64:128] = x[:, :, 192:] = float("nan")
    whole, found = cuda.forward(problem), cuda.forward(replace(problem, **changed))
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))
    copies = [i for i, opcode in enumerate(device.machines["disentangled_forward_bf16_d64"].program.opcodes)
              if opcode.startswith("cp.async.bulk.tensor.4d")]  # fmt: skip
    counts = device.machines["disentangled_forward_bf16_d64"].counts
    before = counts[copies, 0].sum()
    cuda.forward(problem)
    blocks, visited, panels = -(-300 // 128), 2, 1
    assert counts[copies, 0].sum() - before == blocks * visited * panels * 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_sequence_longer_than_was_said_harms_no_other(device, deterministic):
    """On a GPU nobody compares the lengths with `max_seqlen` before the launch."""
    problem = inputs.problem(Case(batch=4, heads=1, nq=200, dtype=BF16, packed=True, **SHORT))
    tokens = problem.q.shape[2]
    honest = replace(problem, cu_seqlens=torch.tensor([0, tokens - 60, tokens], dtype=torch.int32), max_seqlen=tokens)
    forward = cuda.forward(honest)
    dout = torch.randn(forward[0].shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    expected, found = (
        gradients(p, dout, deterministic=deterministic, forward=forward)
        for p in (honest, replace(honest, max_seqlen=64))
    )
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name][:, :, -60:], expected[name][:, :, -60:]), name


LATE = {
    "3+2": (384, (192, 256)),
    "1+3": (384, (320, 384), (64, 128)),
    "3+1+2": (512, (192, 256), (320, 384)),
}


@pytest.mark.parametrize("runs", LATE)
def test_results_do_not_depend_on_the_order_of_warps(device, runs):
    nk, *gaps = LATE[runs]
    problem = with_gaps(Case(batch=1, heads=1, nq=128, nk=nk, dtype=BF16), *gaps)
    expected = cuda.forward(problem)
    for group in range(3):
        device.late = tuple(range(4 * group, 4 * group + 4))
        assert all(torch.equal(a, b) for a, b in zip(expected, cuda.forward(problem), strict=True))
