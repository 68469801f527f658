"""Memory that is not part of the problem is never read: a second run among NaN is bit-equal."""

from dataclasses import replace

import pytest
import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case

CASES = [
    Case(batch=2, heads=2, nq=nq, nk=nk, head_dim=head_dim, dtype=dtype, **more)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for nq, nk, head_dim, more in (
        (1, 1, 8, {}),
        (1, 67, 13, {}),
        (63, 63, 20, {"mask": "holes_tokens"}),
        (65, 65, 64, {"mask": "right", "reachable": True}),
        (111, 111, 72, {"mask": "sparse", "dropout_p": 0.2}),
        (40, 47, 80, {"prefix_length": 7}),
        (130, 70, 96, {"mask": "heads", "terms": "p2c"}),
        (150, 150, 24, {"terms": "c2p", "position_buckets": 16, "max_relative_positions": 40}),
        (70, 70, 48, {"packed": True}),
        (70, 70, 33, {"mask": "all_padding", "terms": "none"}),
    )
]


def guarded(x):
    """Return an equal tensor in the middle of a larger one that is NaN everywhere else (True for masks)."""
    if x is None:
        return None
    poison = True if x.dtype == torch.bool else float("nan")
    wide = torch.full([n + 6 for n in x.shape], poison, dtype=x.dtype, device=x.device)
    # Token-major, as projections give it: the guard of one row is followed by the next head's row.
    if x.dim() == 4 and x.dtype != torch.bool:
        wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
    for dim, n in enumerate(x.shape):
        wide = wide.narrow(dim, 3, n)
    return wide.copy_(x)


def unguarded(x):
    """Return an equal tensor of the same strides, so that the same path is taken, among zeros."""
    if x is None:
        return None
    memory = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


@pytest.fixture
def poisoned_allocations():
    """Let every new, unwritten tensor hold NaN: outputs, gradients and scratch memory of the backends."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(64).isnan().all(), "torch does not fill new memory"
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_guard_surrounds_every_row_with_nan():
    x = torch.randn(2, 3, 4, 5)
    view = guarded(x)
    assert torch.equal(view, x)
    storage = torch.empty(0).set_(view.untyped_storage())
    assert int(storage.isnan().sum()) == storage.numel() - x.numel()
    assert storage[: view.storage_offset()].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_among_nan_are_bit_equal(target, poisoned_allocations, case):
    problem = inputs.problem(case, target.device)
    dout = inputs.dout(case, problem)
    poisoned = {name: guarded(getattr(problem, name)) for name in budget.INPUTS}
    clean = {name: unguarded(x) for name, x in poisoned.items()}
    poisoned_dout = guarded(dout)
    masks = type(problem.masks)(*(guarded(x) for x in vars(problem.masks).values()))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(case.seed)
    expected = budget.evaluate(target.run, replace(problem, **clean), unguarded(poisoned_dout))
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(case.seed)
    results = budget.evaluate(target.run, replace(problem, **poisoned, masks=masks), poisoned_dout)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
        assert name == "lse" or value.isfinite().all(), name
