"""Let the operator tests run on the machine: `pytest -p tests.ptx.targets tests/ops`.

Each backend that is executed is one more target, like an instruction set of the CPU kernel: cuda_on_ptx, and
triton_sm_80_on_ptx and triton_sm_90_on_ptx where Triton is. No other target runs then.
"""

import sys
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deberta_kernels.testing import backends
from deberta_kernels.testing.backends import Target
from tests.ptx.sharing import variant
from tests.selection import keep, target_of

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tools")]

_LOW = (torch.bfloat16, torch.float16)


class OnPtx(Target):
    """A backend that needs a device, executed on the CPU."""

    def skip_reason(self):
        return None

    @contextmanager
    def pinned(self):
        """Put the machine in the place of the device, for forwards and backwards alike."""
        driver, device = _device(self.name)
        with driver.installed(device):
            yield


@cache
def _device(name):
    """Return the driver of a target and its device, which keeps what is compiled."""
    if name == "cuda_on_ptx":
        from ptx.drivers import cuda_driver

        return cuda_driver, cuda_driver.Device()
    from ptx.drivers import triton_driver

    return triton_driver, triton_driver.Device(int(name.split("_")[2]))


def pytest_configure():
    found = [OnPtx("cuda_on_ptx", "cuda", _LOW, most_tiles=24, head_dims=(64, 128), repeats=False)]
    if find_spec("triton"):
        dtypes = (torch.float32, *_LOW)
        found += [OnPtx(f"triton_sm_{n}_on_ptx", "triton", dtypes, most_tiles=24, repeats=False) for n in (80, 90)]
    backends.TARGETS += tuple(found)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Run operator tests on the machine alone: those of Triton's variants that tests beside them compile anyway.

    Ten seconds go to each further variant. A sample of all runs where there is nothing beside them.
    """
    others = [item for item in items if "/ops/" not in item.nodeid]
    executed = [item for item in items if item not in set(others) and isinstance(target_of(item), OnPtx)]
    if others:
        compiled = {variant(item.nodeid) for item in others} - {None}
        executed = [item for item in executed if target_of(item).backend == "cuda" or variant(item.nodeid) in compiled]
    keep(config, items, [*others, *executed])
