"""How the Triton kernels are compiled and launched: side by side, ahead of time, and past Triton's binder."""

import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch
from ptx.drivers import triton_driver
from triton import knobs
from triton.compiler.compiler import ASTSource
from triton.runtime.jit import JITFunction

from deberta_kernels import warmup
from deberta_kernels.impl.triton import direct, execute, launch
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.problems import BF16, SHORT

CASE = Case(batch=1, heads=2, nq=65, dtype=BF16, **SHORT)
REFUSED = mock.Mock(side_effect=AssertionError("Triton was asked"))


@pytest.fixture
def device():
    with triton_driver.installed(triton_driver.Device(90)) as device:
        yield device


def results(case, problem=None):
    """Return out, lse and the five gradients."""
    problem = problem or inputs.problem(case)
    out, lse = execute.forward(problem)
    return [out, lse, *execute.backward(problem, inputs.dout(case, problem), None, out, lse, (True,) * 5)]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_call_like_one_before_does_not_ask_triton(device):
    expected = results(CASE)
    longer = replace(CASE, batch=2, nq=100)
    also = results(longer)
    with mock.patch.object(JITFunction, "run", REFUSED):
        assert_equal(results(CASE), expected)
        assert_equal(results(longer), also)


@pytest.mark.parametrize(
    "other", [replace(CASE, dtype=torch.float16), replace(CASE, head_dim=32), replace(CASE, mask="holes")], ids=str
)
def test_a_call_of_another_kind_asks_triton(device, other):
    results(CASE)
    with mock.patch.object(JITFunction, "run", REFUSED), pytest.raises(AssertionError, match="Triton was asked"):
        results(other)


def test_a_call_on_another_device_asks_triton(device):
    results(CASE)
    with (
        triton_driver.installed(triton_driver.Device(90)),
        mock.patch.object(JITFunction, "run", REFUSED),
        pytest.raises(AssertionError, match="Triton was asked"),
    ):
        results(CASE)


def test_a_pointer_that_does_not_lie_on_16_bytes_is_of_another_form(device):
    planned = launch.forward_launches(inputs.problem(CASE), "sm_90").launches[-1]
    moved = torch.empty(planned.arguments["q_ptr"].numel() + 1, dtype=BF16)[1:]
    other = replace(planned, arguments={**planned.arguments, "q_ptr": moved})
    assert direct.form_of(planned) is not None
    assert direct.form_of(planned) != direct.form_of(other)


def test_a_number_of_64_bits_is_left_to_triton(device):
    planned = launch.forward_launches(inputs.problem(CASE), "sm_90").launches[-1]
    assert direct.form_of(replace(planned, arguments={**planned.arguments, "nk": 2**31})) is None


def test_whoever_watches_launches_is_told_of_each(device):
    expected, told = results(CASE), []
    count = len(launch.forward_launches(inputs.problem(CASE), "sm_90").launches)

    def hook(metadata):
        told.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        execute.forward(inputs.problem(CASE))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(told) == count
    assert all(name.startswith("_disentangled") for name in told)
    assert_equal(results(CASE), expected)


def test_what_is_compiled_side_by_side_is_all_that_a_step_launches(device):
    problem = inputs.problem(CASE)
    assert problem.pos_key is not None
    for x in (problem.q, problem.pos_key):
        x.requires_grad_()
    assert execute.compile_refusal(problem) is None
    with mock.patch.object(JITFunction, "_do_compile", REFUSED):
        results(CASE, inputs.problem(CASE))


def test_a_later_process_finds_what_was_compiled_ahead(device, capsys):
    wanted = warmup.kinds([BF16], ["none", "key"], training=True, dropout=0.1)
    assert warmup.warm(wanted, 64, torch.device("cpu"), print, "triton")
    assert len(capsys.readouterr().out.splitlines()) == len(wanted) == 4
    device.number += 1000  # of which Triton knows nothing yet
    with mock.patch.object(ASTSource, "make_ir", REFUSED):
        for mask in ("none", "right_tokens"):
            results(replace(CASE, mask=mask, dropout_p=0.1))
            execute.forward(inputs.problem(replace(CASE, mask=mask)))


def test_what_fails_side_by_side_is_compiled_by_itself(device):
    problem, make, threads = inputs.problem(CASE), ASTSource.make_ir, []

    def failing(*arguments, **named):
        threads.append(threading.current_thread())
        if threading.current_thread() is not threading.main_thread():
            raise SystemError("AST constructor recursion depth mismatch")
        return make(*arguments, **named)

    with mock.patch.object(ASTSource, "make_ir", failing), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        assert execute.compile_refusal(problem) is None
    assert threading.main_thread() in threads
    assert len(set(threads)) > 1
    results(CASE)


def test_no_length_of_a_mask_is_compiled_for(device):
    results(replace(CASE, nq=128, mask="right_tokens"))
    with mock.patch.object(JITFunction, "_do_compile", REFUSED):
        for length in (100, 65, 1):
            results(replace(CASE, nq=length, mask="right_tokens"))


def test_a_setting_of_the_compiler_that_changes_asks_triton(device):
    results(CASE)
    with knobs.runtime.scope(), mock.patch.object(JITFunction, "run", REFUSED):
        knobs.runtime.debug = not knobs.runtime.debug
        with pytest.raises(AssertionError, match="Triton was asked"):
            results(CASE)
