"""Leave out what is only about Triton's interpreter where that is not what runs."""

from deberta_kernels import env
from tests import needs


def pytest_ignore_collect(collection_path):
    here = env.triton_interpreted() and not needs.missing("triton")
    return True if collection_path.name == "test_triton.py" and not here else None
