"""Leave out the kernels that cannot be compiled here: Triton's unless it is required, CUDA's without one."""

import pytest

from tests import needs
from tests.ptx.kernels import problems


def pytest_ignore_collect(collection_path):
    """Triton takes ten seconds a variant, so `make test-ptx` alone asks for it."""
    needs_triton = collection_path.name.startswith("test_triton") or collection_path.name == "test_self_test.py"
    if needs_triton and "triton" not in needs.required:
        return True
    if collection_path.name == "test_cuda_faults.py" and "cuda_compiler" not in needs.required:
        return True  # a compilation each
    if collection_path.name == "test_counted.py" and not {"triton", "cuda_compiler"} <= needs.required:
        return True  # bounds hold for the compilers of `make test-ptx`
    if collection_path.name.startswith("test_cuda") and needs.cuda_absence():
        return True  # pytest's header says so
    return None


@pytest.fixture(scope="session")
def check():
    """Hold every result and gradient of a case to the error budget."""
    return problems.check
