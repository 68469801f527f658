"""Fences that the package adds to what Triton 3.6 compiles."""

from types import SimpleNamespace

import pytest

from tests import needs

needs.package("triton")

from deberta_kernels.impl.triton import fences

PTX = "cp.async.wait_group \t0;\n\tbar.sync 0;\n\twgmma.mma_async;\n\tcp.async.wait_all;"
KERNEL = "_disentangled_fwd_kernel"


@pytest.fixture
def hook(monkeypatch):
    """Have a hook of somebody else's installed, and let the package install its own."""
    runtime, calls = SimpleNamespace(add_stages_inspection_hook=lambda *given: calls.append(given[1])), []
    monkeypatch.setattr(fences, "knobs", SimpleNamespace(runtime=runtime))
    for _ in range(2):
        fences.let_triton_add()
    return SimpleNamespace(run=runtime.add_stages_inspection_hook, calls=calls)


def compiled(hook, name, capability):
    stages = {"ptx": lambda source, metadata: source}
    hook.run(None, stages, None, None, capability)
    assert hook.calls == [stages]
    return stages["ptx"](PTX, {"name": name})


def test_every_wait_gets_one(hook):
    text = compiled(hook, KERNEL, 90)
    assert [line.strip() for line in text.splitlines()] == [
        "cp.async.wait_group \t0;", "fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.mma_async;",
        "cp.async.wait_all;", "fence.proxy.async.shared::cta;",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "capability"), [("triton_poi_fused_add", 90), (KERNEL, 80)])
def test_other_kernels_and_devices_stay_as_they_are(hook, name, capability):
    assert compiled(hook, name, capability) == PTX


def test_a_device_without_ptx_is_left_alone(hook):
    stages = {"amdgcn": str}
    hook.run(None, stages, None, None, None)
    assert stages == {"amdgcn": str}


@pytest.mark.parametrize("forgotten", [False, True])
def test_pipelined_kernels_of_devices_that_multiply_from_shared_memory_need_them(monkeypatch, forgotten):
    monkeypatch.setattr(fences, "_FORGOTTEN", forgotten)
    assert fences.needed("sm_90", 2) is forgotten
    assert fences.needed("sm_100", 3) is forgotten
    assert not fences.needed("sm_90", 1)
    assert not any(fences.needed(key, 2) for key in ("sm_80", "sm_86", "sm_120", "gfx942", "cpu"))
