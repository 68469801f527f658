"""The tool that compiles the CUDA kernels: what it reads, what it finds wrong, and the kernels themselves."""

import re
from dataclasses import replace

import cuda_offline
import pytest
from offline import cuda
from offline.counting import Counts
from offline.cuda import CudaReport

from deberta_kernels.impl.cuda.modules import ModuleSpec

LOG = """
ptxas info    : (C7514) Potential Performance Loss: wgmma instructions are serialized in the function 'one_d64'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one_d64_pair' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compiling entry function 'one_d64' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 16 barriers
"""
GOOD = CudaReport(168, 0, 229_000, 0, Counts(520), Counts(260), Counts(255))
BOUND = {"near loop": [520, 530], "far loop": [260, 265]}


def test_the_log_is_read():
    assert cuda.read_log(LOG) == {"one_d64_pair": cuda.Usage(168, 20, 0), "one_d64": cuda.Usage(90, 0, 1)}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (replace(GOOD, spills=8), "8 bytes of spills"),
        (replace(GOOD, serialised=1), "its products are serialised"),
        (replace(GOOD, shared=240_000), "240000 bytes of shared memory are more than 232448"),
        (replace(GOOD, near=Counts(710)), "1420 instructions for a near tile of 128 x 128, over 1400"),
        (replace(GOOD, near=Counts(535)), r"near loop 535 is over 530 \(was 520\)"),
        (replace(GOOD, far=Counts(290)), "far loop 290, plain flash attention 255"),
        (replace(GOOD, far=Counts(266)), "far loop 266 is over 265"),
    ],
)
def test_what_is_wrong_is_said(report, message):
    assert cuda_offline.broken("one_d64", GOOD, BOUND) == []
    assert re.search(message, cuda_offline.broken("one_d64", report, BOUND)[0])


def test_a_kernel_without_a_bound_is_wrong():
    assert "no bound is committed" in cuda_offline.broken("one_d64", GOOD, None)[0]


def test_bounds_of_every_kernel_are_committed():
    bounds = cuda_offline.json.loads(cuda_offline.BOUNDS.read_text())
    names = {kernel for spec in cuda.MODULES for kernel in spec.kernels}
    assert bounds
    assert all(set(kernels) == names for kernels in bounds.values())


def test_sources_include_only_each_other():
    """At run time there may be no header of CUDA or C++; nvcc alone takes cstdint."""
    allowed = {path.name for path in cuda.SOURCES.iterdir()} | {"cstdint"}
    sources = [path for path in cuda.SOURCES.iterdir() if path.suffix in (".h", ".cu")]
    assert sources
    for path in sources:
        assert set(re.findall(r"#include [<\"]([^>\"]+)", path.read_text())) <= allowed, path


@pytest.mark.skipif(cuda.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_compile_without_spills_and_without_serialised_products(head_dim, tmp_path):
    log, cubin = cuda.run_compiler(cuda.SOURCES, ModuleSpec("forward", "bf16", head_dim), tmp_path)
    usage = cuda.read_log(log)
    assert len(usage) == 4
    assert all(one.spills == 0 and one.serialised == 0 for one in usage.values()), usage
    info = cuda.constants(cubin.read_bytes())
    assert info[:2] == (1, head_dim)
    assert info[5] <= cuda_offline.SHARED
