"""Memory that nobody has written is known as such from one launch to the next."""

import pytest
import torch
from ptx.drivers import cuda_driver, cuda_modules
from ptx.drivers.unwritten import new_memory_is_unwritten, pattern
from ptx.errors import PtxError

from deberta_kernels.impl import cuda
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.problems import BF16, SHORT

CASE = Case(batch=1, heads=1, nq=70, dtype=BF16, **SHORT)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty(3, 5, dtype=x.dtype),
        lambda x: torch.empty_like(x),
        lambda x: torch.empty_strided((2, 3), (8, 1), dtype=x.dtype),
        lambda x: x.new_empty(7),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8])
def test_new_memory_is_marked(make, dtype):
    x = torch.zeros(4, 4, dtype=dtype)
    with new_memory_is_unwritten():
        found = make(x)
    words = torch.as_strided(found, (found.untyped_storage().nbytes() // found.element_size(),), (1,))
    size = words.numel() * words.element_size() // 2 * 2
    assert set(words.view(torch.uint8)[:size].view(torch.int16).tolist()) == {pattern() - (1 << 16)}


def test_another_device_is_left_alone_and_is_still_the_default_afterwards():
    with new_memory_is_unwritten(), torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"


@pytest.mark.skipif(not cuda_modules.compilers(), reason="there is neither nvcc nor NVRTC")
def test_sums_into_memory_that_nobody_zeroed(monkeypatch):
    problem = inputs.problem(CASE)
    with cuda_driver.installed(cuda_driver.Device()):
        out, lse = cuda.forward(problem)
        zeros = torch.zeros
        # The sums of all gradients are one flat piece of memory.
        monkeypatch.setattr(
            torch, "zeros", lambda *shape, **given: (torch.empty if len(shape) == 1 else zeros)(*shape, **given)
        )
        with pytest.raises(PtxError, match="reduction of memory that nobody wrote"):
            cuda.backward(problem, inputs.dout(CASE, problem), None, out, lse, (True,) * 5)
