"""The package's way to the GPU, from a call to the launch, over libcuda as the PTX machine has it."""

import ctypes
from dataclasses import replace
from unittest import mock

import pytest
import torch
from ptx.drivers import cuda_driver

from deberta_kernels.impl import cuda, torch_tiled
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.impl.cuda import driver, image
from deberta_kernels.impl.cuda.arguments import ForwardParams
from deberta_kernels.impl.cuda.backward_arguments import BackwardParams
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.problems import BF16, FP16, SHORT

STREAM = 77
SMALL = Case(batch=1, heads=1, nq=20, dtype=BF16)


@pytest.fixture
def device():
    with (
        cuda_driver.installed(cuda_driver.Device()) as device,
        mock.patch.object(cuda, "_stream", return_value=STREAM),
    ):
        yield device


def calls(device, name):
    return [call for call in device.calls if call.split()[0] == name]


def info(which="forward", head_dim=64):
    return cuda._load(which, torch.empty(1, head_dim, dtype=BF16)).info


def test_a_launch_names_grid_block_memory_and_stream(device):
    problem = inputs.problem(Case(batch=2, heads=3, nq=200, dtype=BF16, mask="blocks", dropout_p=0.2))
    cuda.forward(problem)
    found = info()
    blocks = 2 * 3 * -(-200 // found.rows)
    launch = f"grid {blocks} 1 1, block {found.threads} 1 1, shared {found.shared_bytes}, stream {STREAM}"
    assert calls(device, "cuLaunchKernel") == [f"cuLaunchKernel {launch}"]
    maps = calls(device, "cuTensorMapEncodeTiled")
    assert maps.count("cuTensorMapEncodeTiled 9, 4 dimensions, 3 3 0") == 2
    assert maps.count("cuTensorMapEncodeTiled 9, 3 dimensions, 3 3 0") == 2
    assert "cuModuleGetFunction disentangled_forward_bf16_d64_pair_dropout" in device.calls
    assert device.contexts == 0


def test_a_module_is_loaded_once(device):
    for _ in range(3):
        cuda.forward(inputs.problem(SMALL))
    assert len(calls(device, "cuModuleLoadData")) == len(calls(device, "cuDevicePrimaryCtxRetain")) == 1
    assert len(calls(device, "cuLaunchKernel")) == 3


@pytest.mark.parametrize("terms", ["c2p+p2c", "c2p", "p2c"])
def test_prepared_tables_give_the_same_bits(device, terms):
    for settings in (SHORT, {}):
        problem = inputs.problem(Case(batch=1, heads=2, nq=150, dtype=BF16, terms=terms, **settings))
        prepared = cuda.prepare(problem.pos_key, problem.pos_query, problem.position)
        plain, kept = cuda.forward(problem), cuda.forward(replace(problem, prepared=prepared))
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_prepared_tables_of_another_layout_are_refused(device):
    problem = inputs.problem(Case(batch=1, heads=2, nq=50, dtype=BF16))
    prepared = cuda.prepare(problem.pos_key, problem.pos_query, problem.position)
    with pytest.raises(ValueError, match=r"prepared must be what prepare returned .*prepare the tables again\."):
        cuda.forward(replace(problem, prepared=prepared[:, :, 1:]))
    assert cuda.prepare(None, None, problem.position) is None


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, heads=2, nq=100, dtype=BF16, mask="holes_tokens"),
        Case(batch=1, heads=1, nq=200, dtype=FP16, **SHORT),
        Case(batch=3, heads=1, nq=90, dtype=FP16, packed=True, dropout_p=0.2),
    ],
    ids=lambda case: case.id,
)
def test_out_and_lse_serve_the_backward_of_another_backend(device, case):
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    against = budget.truth(problem, dout)
    out, lse = cuda.forward(problem)
    found = torch_tiled.backward(problem, dout, None, out, lse, (True,) * 5)
    report = budget.measure({"out": out, "lse": lse, **found._asdict()}, against, case.id)
    assert report.ok, str(report)


def test_a_backward_is_two_launches_of_one_module(device):
    problem = inputs.problem(Case(batch=2, heads=2, nq=150, dtype=BF16, mask="blocks", dropout_p=0.2))
    out, lse = cuda.forward(problem)
    device.calls.clear()
    assert cuda.backward_refusal(problem) is None
    cuda.backward(problem, out, None, out, lse, (True,) * 5)
    found = info("backward")
    assert calls(device, "cuLaunchKernel") == [
        f"cuLaunchKernel grid {2 * 2 * 2} 1 1, block {found.threads} 1 1, shared {found.shared_bytes}, stream {STREAM}",
        f"cuLaunchKernel grid {2 * 2 * 3} 1 1, block 128 1 1, shared 0, stream {STREAM}",
    ]
    names = [call.split()[1] for call in calls(device, "cuModuleGetFunction")]
    assert sorted(names) == sorted(
        ["disentangled_backward_dq_bf16_d64", *(f"disentangled_backward_bf16_d64{pair}{dropout}"
         for pair in ("", "_pair") for dropout in ("", "_dropout"))]
    )  # fmt: skip
    assert device.contexts == 0


def loaded(dtype=BF16, head_dim=64):
    return cuda._load("forward", torch.empty(1, head_dim, dtype=dtype))


def test_other_devices_are_refused_by_their_capability(device):
    device.capability = (8, 0)
    assert loaded() == "the GPU has compute capability 8.0, it needs 9.0"


@pytest.mark.parametrize("name", ["cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction"])
def test_what_the_driver_refuses_at_loading_is_a_reason(device, name):
    device.failing[name] = 209
    assert loaded() == f"{name}: made to fail (209)"
    with pytest.raises(RuntimeError, match=rf"the CUDA kernels cannot be loaded: {name}: made to fail \(209\)"):
        cuda.forward(inputs.problem(SMALL))
    assert device.contexts == 0


@pytest.mark.parametrize("status", [2, 900])
def test_what_may_pass_is_tried_again(device, status):
    device.failing["cuModuleLoadData"] = status
    assert loaded() == f"cuModuleLoadData: made to fail ({status})"
    device.failing.clear()
    assert isinstance(loaded(), tuple)


def test_a_launch_that_fails_raises(device):
    device.failing["cuLaunchKernel"] = 700
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: made to fail \(700\)"):
        cuda.forward(inputs.problem(SMALL))
    assert device.contexts == 0


def test_a_bad_module_gives_way_to_the_next_and_all_reasons_are_said(device):
    good = next(image.images("forward", BF16, 64))
    start = good.index(b"\0.nv.constant3\0") + len(b"\0.nv.constant3\0")
    old = good[:start] + (7).to_bytes(4, "little") + good[start + 4 :]
    absent = image.ImageError("no CUDA module was built with the package")
    with mock.patch.object(image, "images", return_value=iter([absent, good[:90], old, good])):
        assert isinstance(loaded(), tuple)
    with (
        mock.patch.object(image, "images", return_value=iter([absent, good[:90], old])),
        mock.patch.object(cuda, "_loaded", Attempts()),
    ):
        reason = loaded()
    assert reason.startswith("no CUDA module was built with the package; the CUDA module is damaged (")
    assert reason.endswith("; the CUDA module has version 7 of its arguments, not 1")


@pytest.mark.parametrize(
    ("failing", "devices", "message"),
    [({"cuInit": 100}, 1, r"cuInit: made to fail \(100\)"), ({}, 0, "the NVIDIA driver shows no device")],
)
def test_a_driver_without_a_device_says_so(failing, devices, message):
    device = cuda_driver.Device()
    device.failing, device.devices = failing, devices
    with pytest.raises(driver.DriverError, match=message), cuda_driver.installed(device):
        pass


def test_status_names_driver_and_devices(device):
    found = cuda.status()
    assert (found["driver"], found["devices"]) == ("13.0", ["9.0"])


def test_arguments_have_the_size_that_the_kernels_expect(device):
    problem = inputs.problem(SMALL)
    out, lse = cuda.forward(problem)
    cuda.backward(problem, out, None, out, lse, (True,) * 5)
    for name, machine in device.machines.items():
        if machine.counts.any():
            params = BackwardParams if "backward" in name else ForwardParams
            size = machine.program.kernel.parameter_bytes
            assert ctypes.sizeof(params) <= size < ctypes.sizeof(params) + 64, name
