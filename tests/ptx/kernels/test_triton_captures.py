"""A first call of the Triton kernels while a CUDA graph is captured: refused by name, and nothing broken afterwards."""

from unittest import mock

import pytest
import torch
from ptx.drivers import triton_driver
from triton import knobs

from deberta_kernels import dispatch
from deberta_kernels.impl.triton import execute
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.torch_state import captures
from deberta_kernels.torch_state.captures import CaptureError
from tests.ptx.kernels.problems import BF16, SHORT

CASE = Case(batch=1, heads=1, nq=65, dtype=BF16, **SHORT)


@pytest.fixture
def device():
    with triton_driver.installed(triton_driver.Device(80)) as device:
        yield device


def captured():
    return mock.patch.object(captures, "capturing", return_value=True)


def test_kernels_are_not_compiled_during_a_capture_but_before_it(device, check):
    problem = inputs.problem(CASE)
    with captured(), pytest.raises(CaptureError, match=r"compile and load the Triton kernels.* before the capture"):
        dispatch.choose(problem, "triton")
    assert device.machines == {}
    check("triton", CASE)
    with captured():
        check("triton", CASE)


def test_a_backward_that_was_never_run_is_not_compiled_during_a_capture(device):
    problem = inputs.problem(CASE)
    assert execute.compile_refusal(problem) is None
    out, lse = execute.forward(problem)
    asked = (problem, inputs.dout(CASE, problem), None, out, lse, (True,) * 5)
    before = knobs.runtime.jit_cache_hook
    with captured(), pytest.raises(CaptureError, match="compile and load a Triton kernel"):
        execute.backward(*asked)
    assert knobs.runtime.jit_cache_hook is before
    expected = execute.backward(*asked)
    with captured():
        found = execute.backward(*asked)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
