"""The self-test of the package, run by the compiled kernels: it passes, and it notices a kernel that is wrong."""

from functools import cache

import pytest
import torch
from ptx.drivers import cuda_driver, triton_driver

import deberta_kernels as dk
from deberta_kernels import api, backends, dispatch, env, notices
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.proof import record, self_test, variants
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.problems import BF16, FP16

CASE = Case(batch=1, heads=1, nq=70, dtype=BF16)
CPU = torch.device("cpu")
IDENTITY = {
    "device": "a device", "capability": "9.0", "deberta_kernels": "1", "torch": "2", "triton": "3", "cuda": "13",
    "driver": "1",
}  # fmt: skip


def variant(backend, dtype=BF16, head_dim=64, masks="none", positions=True, dropout=False, backward=True):
    return variants.Variant(backend, dtype, head_dim, masks, positions, dropout, backward, False, False)


def every_mask(backend, dtype):
    return [variant(backend, dtype, masks=masks, dropout=p)
            for masks in ("none", "tokens", "pairs", "packed") for p in (False, True)]  # fmt: skip


def on_machine(backend, architecture=90):
    driver = cuda_driver if backend == "cuda" else triton_driver
    return driver.installed(device_of(backend, architecture))


@cache
def device_of(backend, architecture):
    """Return one device for all tests, which keeps what is compiled."""
    if backend == "cuda":
        return cuda_driver.Device()
    return triton_driver.Device(architecture)


def named(found):
    return [pytest.param(v, id=f"{v.backend}: {v}") for v in found]


CUDA = [
    *every_mask("cuda", BF16), variant("cuda", FP16, masks="tokens", dropout=True),
    variant("cuda", masks="tokens", positions=False), variant("cuda", head_dim=128, masks="pairs", backward=False),
]  # fmt: skip
TRITON = [variant("triton", masks="tokens", dropout=True), variant("triton", masks="packed"), variant("triton", FP16)]


@pytest.mark.parametrize("tested", named(CUDA))
def test_the_cuda_kernels_pass(tested):
    with on_machine("cuda"):
        assert self_test._test(dispatch.load("cuda"), tested, CPU) == ""


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("tested", named(TRITON))
def test_the_triton_kernels_pass(tested, architecture):
    with on_machine("triton", architecture):
        assert self_test._test(dispatch.load("triton"), tested, CPU) == ""


@pytest.fixture
def first_use(monkeypatch, tmp_path):
    """A device that nobody has seen, in the place of this CPU."""
    monkeypatch.setattr(self_test, "_TESTED_DEVICES", "cpu")
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setattr(self_test, "_attempts", Attempts())
    monkeypatch.setattr(record, "identity", lambda backend, device: {"backend": backend, **IDENTITY})
    monkeypatch.setattr(dispatch, "order", lambda device_type: backends.order("cuda"))
    monkeypatch.setattr(notices, "_warned", set())
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(env.SELF_TEST, raising=False)


def call(backend):
    problem = inputs.problem(CASE)
    return api.run_attention(
        problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query, masks=problem.masks,
        position=problem.position, scale=problem.scale, max_seqlen=problem.max_seqlen, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_call_launches_the_test_once(first_use, backend):
    with on_machine(backend) as device:
        device.seed = 0  # launches so far
        call(backend)
        first = device.seed
        call(backend)
        assert device.seed - first < first <= 2 * (device.seed - first)
    assert self_test.status()["kept"] == 1


def test_a_wrong_cuda_kernel_is_refused(first_use, monkeypatch):
    with on_machine("cuda") as device:
        launch = device.launch

        def wrong(*arguments):
            launch(*arguments)
            for x, written in device.memory:
                if written and x.dtype == BF16:
                    x[(0,) * x.dim()] += 1

        monkeypatch.setattr(device, "launch", wrong)
        with pytest.raises(NotImplementedError, match=r"backend='cuda' cannot run this call: its self-test .* out is"):
            call("cuda")


class WrongExponential(triton_driver.Device):
    """A compiler whose exponential is another function."""

    def keep(self, kernel):
        super().keep(kernel)
        key = kernel.metadata.hash
        text, *rest = self._compiled[key]
        self._compiled[key] = (text.replace("ex2.approx.ftz.f32", "abs.ftz.f32"), *rest)


def test_the_next_backend_answers_for_a_wrong_triton_kernel(first_use):
    expected = call("torch")
    with triton_driver.installed(WrongExponential(90)):
        with pytest.warns(dk.DebertaKernelsWarning, match=r"runs backend 'torch'.*self-test .* failed: out"):
            assert torch.equal(call("auto"), expected)
        with pytest.raises(NotImplementedError, match=r"bfloat16 with head_dim 64; a device of capability 9\.0"):
            call("triton")


def test_a_fault_of_the_machine_is_a_crash(first_use, monkeypatch):
    def fault(*arguments):
        raise ValueError("out of range")

    with on_machine("cuda") as device:
        monkeypatch.setattr(device, "launch", fault)
        with pytest.raises(NotImplementedError, match=r"failed: it raised DriverError: cuLaunchKernel: out of range"):
            call("cuda")
