"""The package's way to the GPU, from a call to the launch, over libcuda's interface as the emulated device has it."""

import struct
from dataclasses import replace

import pytest
import torch

from deberta_kernels.impl import cuda, torch_tiled
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.impl.cuda import driver, image
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from tests.cuda_emulation import harness

BF16, FP16 = torch.bfloat16, torch.float16
SHORT = {"position_buckets": 16, "max_relative_positions": 64}
STREAM = 77


def module_file(info):
    """Return an ELF file that holds `info` where nvcc puts it, and nothing else."""
    names = b"\0.shstrtab\0.nv.constant3\0"
    content = struct.pack("<7i", *info)
    start = 64 + len(names)
    headers = [(0, 0, 0, 0, 0, 0), (1, 3, 0, 0, 64, len(names)), (11, 1, 0, 0, start, len(content))]
    table = b"".join(struct.pack("<IIQQQQ", *header).ljust(64, b"\0") for header in headers)
    head = b"\x7fELF".ljust(40, b"\0") + struct.pack("<Q", start + len(content))
    return head.ljust(58, b"\0") + struct.pack("<HHH", 64, len(headers), 1) + names + content + table


def info_of(library, head_dim, which="forward"):
    info = library.emulated_info(head_dim) if which == "forward" else library.emulated_backward_info()
    return [getattr(info, name) for name, _ in info._fields_]


@pytest.fixture
def device(monkeypatch):
    """Put the emulated device in the place of the driver; its kernels may touch what the arguments name only."""
    library = harness.library()
    library.emulated_driver(b"", 0, 90, 1)
    opened = driver.Driver(str(harness.build()))
    launch = driver.Module.launch

    def allowed(self, name, arguments, blocks, stream):
        harness.allow(library, arguments.memory)
        launch(self, name, arguments, blocks, stream)

    monkeypatch.setattr(driver.Module, "launch", allowed)
    monkeypatch.setattr(driver, "_opened", lambda: (opened, None))
    monkeypatch.setattr(cuda, "_loaded", Attempts())
    monkeypatch.setattr(cuda, "_ordinal", lambda device: 0)
    monkeypatch.setattr(cuda, "_stream", lambda device: STREAM)
    monkeypatch.setattr(
        image, "images", lambda which, dtype, head_dim: iter([module_file(info_of(library, head_dim, which))])
    )
    return library


CASES = [
    Case(batch=2, heads=2, nq=100, dtype=BF16),
    Case(batch=1, heads=1, nq=130, head_dim=128, dtype=FP16, mask="heads", dropout_p=0.2),
    Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, dtype=BF16, mask="holes"),
    Case(batch=3, heads=2, nq=90, dtype=FP16, packed=True, dropout_p=0.1),
    Case(batch=2, heads=1, nq=70, dtype=BF16, terms="none"),
    *(Case(batch=2, heads=2, nq=50, dtype=BF16, layout=layout) for layout in inputs.LAYOUTS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_call_gives_what_the_kernel_gives(device, case):
    problem = inputs.problem(case)
    out, lse = cuda.forward(problem)
    expected = harness.run(problem)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert device.emulated_driver_contexts() == 0


def test_a_launch_names_grid_block_memory_and_stream(device):
    problem = inputs.problem(Case(batch=2, heads=3, nq=200, dtype=BF16, mask="blocks", dropout_p=0.2))
    cuda.forward(problem)
    log = device.emulated_driver_log().decode()
    info = device.emulated_info(64)
    blocks = 2 * 3 * -(-200 // info.rows)
    launch = f"grid {blocks} 1 1, block {info.threads} 1 1, shared {info.shared_bytes}, stream {STREAM}"
    assert log.splitlines()[-1] == f"cuLaunchKernel {launch}"
    assert log.count("cuTensorMapEncodeTiled 9, 4 dimensions, 3 3 0") == 2
    assert log.count("cuTensorMapEncodeTiled 9, 3 dimensions, 3 3 0") == 2
    assert "cuModuleGetFunction disentangled_forward_bf16_d64_pair_dropout" in log


def test_a_module_is_loaded_once(device):
    problem = inputs.problem(Case(batch=1, heads=1, nq=20, dtype=BF16))
    for _ in range(3):
        cuda.forward(problem)
    log = device.emulated_driver_log().decode()
    assert log.count("cuModuleLoadData") == log.count("cuDevicePrimaryCtxRetain") == 1
    assert log.count("cuLaunchKernel") == 3


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


BACKWARD_CASES = [
    Case(batch=2, heads=2, nq=100, dtype=BF16, mask="holes_tokens"),
    Case(batch=1, heads=1, nq=330, dtype=FP16, **SHORT),
    Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, dtype=BF16, mask="heads", dropout_p=0.2),
    Case(batch=3, heads=2, nq=90, dtype=FP16, packed=True, dropout_p=0.1),
    Case(batch=2, heads=1, nq=70, dtype=BF16, terms="none"),
]


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.id)
def test_gradients_of_a_call_are_within_the_budget(device, case):
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    against = budget.truth(problem, dout)
    out, lse = cuda.forward(problem)
    found = cuda.backward(problem, dout, None, out, lse, (True,) * 5)
    results = {name: x for name, x in found._asdict().items() if x is not None}
    report = budget.measure({"out": out, "lse": lse, **results}, against, case.id)
    assert report.ok, str(report)
    assert device.emulated_driver_contexts() == 0


def test_a_backward_is_two_launches_of_one_module(device):
    problem = inputs.problem(Case(batch=2, heads=2, nq=150, dtype=BF16, mask="blocks", dropout_p=0.2))
    out, lse = cuda.forward(problem)
    device.emulated_driver(b"", 0, 90, 1)
    assert cuda.backward_refusal(problem) is None
    cuda.backward(problem, out, None, out, lse, (True,) * 5)
    log = device.emulated_driver_log().decode().splitlines()
    info = device.emulated_backward_info()
    assert [line for line in log if line.startswith("cuLaunchKernel")] == [
        f"cuLaunchKernel grid {2 * 2 * 2} 1 1, block {info.threads} 1 1, shared {info.shared_bytes}, stream {STREAM}",
        f"cuLaunchKernel grid {2 * 2 * 3} 1 1, block 128 1 1, shared 0, stream {STREAM}",
    ]
    names = [line.split()[1] for line in log if line.startswith("cuModuleGetFunction")]
    assert sorted(names) == sorted(
        ["disentangled_backward_dq_bf16_d64", *(f"disentangled_backward_bf16_d64{pair}{dropout}"
         for pair in ("", "_pair") for dropout in ("", "_dropout"))]
    )  # fmt: skip


def loaded(dtype=BF16, head_dim=64):
    return cuda._load("forward", torch.empty(1, head_dim, dtype=dtype))


def test_other_devices_are_refused_by_their_capability(device):
    device.emulated_driver(b"", 0, 80, 1)
    assert loaded() == "the GPU has compute capability 8.0, it needs 9.0"


@pytest.mark.parametrize("name", ["cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction"])
def test_what_the_driver_refuses_at_loading_is_a_reason(device, name):
    device.emulated_driver(name.encode(), 209, 90, 1)
    assert loaded() == f"{name}: made to fail (209)"
    with pytest.raises(RuntimeError, match=rf"the CUDA kernels cannot be loaded: {name}: made to fail \(209\)"):
        cuda.forward(inputs.problem(Case(batch=1, heads=1, nq=20, dtype=BF16)))
    assert device.emulated_driver_contexts() == 0


@pytest.mark.parametrize("status", [2, 900])
def test_what_may_pass_is_tried_again(device, status):
    device.emulated_driver(b"cuModuleLoadData", status, 90, 1)
    assert loaded() == f"cuModuleLoadData: made to fail ({status})"
    device.emulated_driver(b"", 0, 90, 1)
    assert isinstance(loaded(), tuple)


def test_a_launch_that_fails_raises(device):
    device.emulated_driver(b"cuLaunchKernel", 700, 90, 1)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: made to fail \(700\)"):
        cuda.forward(inputs.problem(Case(batch=1, heads=1, nq=20, dtype=BF16)))
    assert device.emulated_driver_contexts() == 0


def test_a_bad_module_gives_way_to_the_next_and_all_reasons_are_said(device, monkeypatch):
    good = module_file(info_of(device, 64))
    old = module_file([7, *info_of(device, 64)[1:]])
    absent = image.ImageError("no CUDA module was built with the package")
    monkeypatch.setattr(image, "images", lambda *of: iter([absent, good[:90], old, good]))
    assert isinstance(loaded(), tuple)
    monkeypatch.setattr(cuda, "_loaded", Attempts())
    monkeypatch.setattr(image, "images", lambda *of: iter([absent, good[:90], old]))
    reason = loaded()
    assert reason.startswith("no CUDA module was built with the package; the CUDA module is damaged (")
    assert reason.endswith("; the CUDA module has version 7 of its arguments, not 1")


def test_a_driver_without_a_device_says_so():
    library = harness.library()
    for failing, status, devices, message in (
        (b"cuInit", 100, 1, r"cuInit: made to fail \(100\)"),
        (b"", 0, 0, "the NVIDIA driver shows no device"),
    ):
        library.emulated_driver(failing, status, 90, devices)
        with pytest.raises(driver.DriverError, match=message):
            driver.Driver(str(harness.build()))


def test_status_names_driver_and_devices(device):
    found = cuda.status()
    assert (found["driver"], found["devices"]) == ("13.2", ["9.0"])
