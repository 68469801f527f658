"""What fails while Triton loads a kernel onto a device, over a stand-in for it, and is tried again."""

import warnings

import pytest
import torch
from ptx.drivers import triton_driver

from deberta_kernels import dispatch, notices
from deberta_kernels.impl import triton as backend
from deberta_kernels.impl.triton import execute, launch
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case

CASE = Case(batch=1, heads=1, nq=64, dtype=torch.bfloat16)


@pytest.fixture
def loads(monkeypatch):
    """Errors that loading a kernel raises, in order, before it succeeds; on a device that nothing was loaded to."""
    errors = []
    load = triton_driver._Utils.load_binary

    def load_binary(*arguments):
        if errors:
            raise errors.pop(0)
        return load(*arguments)

    monkeypatch.setattr(triton_driver._Utils, "load_binary", load_binary)
    monkeypatch.setattr(notices, "_warned", set())
    monkeypatch.setattr(dispatch, "order", lambda device_type: ("triton", "torch"))
    with triton_driver.installed(triton_driver.Device(80)):
        yield errors


@pytest.fixture
def problem():
    return inputs.problem(CASE)


MEMORY = RuntimeError("Triton Error [CUDA]: out of memory")


def test_out_of_memory_while_loading_costs_one_call(loads, problem):
    loads.append(MEMORY)
    with pytest.warns(dispatch.DebertaKernelsWarning, match=r"now, which a later call tries again \(.*out of memory"):
        assert dispatch.choose(problem) == "torch"
    assert dispatch.choose(problem) == "triton"
    out, _ = backend.forward(problem)  # what was loaded at the second attempt runs
    assert bool(out.isfinite().all())


def test_a_backend_asked_for_by_name_says_what_failed(loads, problem):
    loads.append(MEMORY)
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run .* a later call tries again"):
        dispatch.choose(problem, "triton")
    assert dispatch.choose(problem, "triton") == "triton"


def test_a_passing_failure_hides_no_lasting_one(loads, problem):
    loads.append(MEMORY)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="now, which a later call tries again"):
        dispatch.choose(problem)
    loads.append(RuntimeError("ptxas died"))
    with pytest.warns(dispatch.DebertaKernelsWarning, match=r"do not compile for sm_80 \(RuntimeError: ptxas died\)"):
        dispatch.choose(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(problem) == "torch"


@pytest.mark.parametrize("error", [MEMORY, KeyboardInterrupt()], ids=repr)
def test_a_kernel_that_failed_to_load_in_a_launch_is_loaded_by_the_next(loads, problem, error):
    step = launch.forward_launches(problem, "sm_80").launches[0]
    launch._compiled(step)  # compiled and not loaded: a call with other strides has kernels of its own
    loads.append(error)
    with pytest.raises(type(error)):
        launch.run(step)
    launch.run(step)
    assert launch._compiled(step).module is not None


def test_an_interruption_is_no_refusal(loads, problem):
    loads.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        execute.compile_refusal(problem)
    assert execute.compile_refusal(problem) is None
