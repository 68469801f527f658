"""Leave out what is only about Triton's interpreter where that is not what runs; ask for the same bits."""

import pytest
import torch

from deberta_kernels import env
from tests import needs


def pytest_ignore_collect(collection_path):
    here = env.triton_interpreted() and not needs.missing("triton")
    return True if collection_path.name == "test_triton.py" and not here else None


@pytest.fixture
def same_bits(target):
    """Ask for the same bits from the same call where they are not given otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not target.repeats)
    yield
    torch.use_deterministic_algorithms(before)
