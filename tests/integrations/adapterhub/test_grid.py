"""Method x composition x head x kind of model x order of patching: in each cell as without the patch, and fused.

A run takes the cells of `grid.pairwise`; `pytest --every-case` takes all of them, half an hour, and lists them.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import deberta_kernels as dk
from tests import needs

adapters = needs.package("adapters")
from deberta_kernels.integrations.adapters import DebertaV2AdapterModel
from tests.integrations.adapterhub import grid
from tests.integrations.adapterhub.setups import COMPOSITIONS, METHODS, MODELS, PACKAGES

SAMPLES = 4
NOT_POSSIBLE = "raises"
SECOND_LOOKS = 0.02  # of the cells, and one
_ORDERS = {
    "patch, init, add": "patch first",
    "init, patch, add": "patch between",
    "init, add, patch": "adapters first",
    "patch_all, init, add": "patch_all first",
}
# Of the last cell without the patch: its model, results and truth, or its error. Neighbours in the grid share it.
_without: dict[tuple[Any, ...], Any] = {}
_seen: dict[tuple[str, str], Counter[str]] = {}
_reasons: Counter[str] = Counter()


class OtherOrder(TorchFunctionMode):
    """Products of matrices summed in another order: as exact, and rounded differently."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function in (nn.functional.linear, torch.matmul, torch.bmm):
            left, right, *rest = arguments
            order = torch.randperm(left.shape[-1], generator=self.generator)
            right = right[:, order] if function is nn.functional.linear else right[..., order, :]
            arguments = (left[..., order], right, *rest)
        return function(*arguments, **(named or {}))


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = grid.all_cells() if metafunc.config.getoption("--every-case") else grid.pairwise()
        metafunc.parametrize("cell", cells, ids=["-".join(cell) for cell in cells])


@pytest.fixture
def make(adapt) -> Callable[..., Any]:
    """Build the model of a cell: make(cell, fused)."""

    def make(cell: grid.Cell, fused: bool) -> Any:
        suffix, settings, add_head = grid.HEADS[cell.head]
        settings = {**settings, **MODELS[cell.model]}
        one = settings.pop("head", None) is not None
        if cell.order == grid.FLEXIBLE:
            plain = adapters.DebertaAdapterModel if one else adapters.DebertaV2AdapterModel
            head = DebertaV2AdapterModel if fused and not one else plain
            order = "adapters first" if fused and one else None
        else:
            head = ("Deberta" if one else "DebertaV2") + suffix
            order = _ORDERS[cell.order] if fused else None
        names = "a" if cell.composition == grid.ONE else "ab"
        model = adapt(dict.fromkeys(names, METHODS[cell.method]), None, order, head=head, **settings)
        if cell.order == grid.FLEXIBLE:
            add_head(model)
        extra = {"samples": SAMPLES} if cell.composition == "BatchSplit" else {}
        setup = "a" if cell.composition == grid.ONE else COMPOSITIONS[cell.composition](*names, **extra)
        if cell.composition == "Fuse":
            model.add_adapter_fusion(setup)
        model.set_active_adapters(setup)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    return make


@pytest.fixture
def without_the_patch(make, results, in_float64) -> Callable[..., Any]:
    """Return a cell's model without the patch, its results and the truth, or the error that AdapterHub raises."""

    def without_the_patch(cell: grid.Cell, inputs: dict[str, Any]) -> Any:
        key = (*cell[:4], cell.order == grid.FLEXIBLE)
        if key not in _without:
            _without.clear()
            try:
                model = make(cell, fused=False)
                _without[key] = model, results(model, inputs), in_float64(model, inputs)
            except Exception as error:  # whatever AdapterHub raises, the fused model raises
                _without[key] = error
        return _without[key]

    return without_the_patch


@pytest.fixture
def note_second_look(request, tmp_path_factory) -> Callable[[grid.Cell], None]:
    """Note that a cell got a second look, in a file that all processes of a run share; fail when they are not rare."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if hasattr(request.config, "workerinput") else folder) / "second_looks"

    def note_second_look(cell: grid.Cell) -> None:
        with shared.open("a", encoding="utf-8") as file:
            file.write("-".join(cell) + "\n")
        looks = shared.read_text(encoding="utf-8").splitlines()
        cells = sum(item.function is request.function for item in request.session.items)
        assert len(looks) <= SECOND_LOOKS * cells + 1, looks

    return note_second_look


@pytest.fixture
def hold_to_budget(results, compare, note_second_look) -> Callable[..., None]:
    """Compare as the budget says; a cell over it gets a second look, at eager's errors in other orders of summation."""

    def hold_to_budget(cell: grid.Cell, inputs: dict[str, Any], found: dict[str, Any], without: Any) -> None:
        model, eager, truth = without
        try:
            compare(found, eager, truth)
        except AssertionError:
            note_second_look(cell)
            dk.unpatch_all()  # else eager's model would be fused as well
            runs = [eager]
            for seed in range(8):
                with OtherOrder(seed):
                    runs.append(results(model, inputs))
            errors = {name: [(run[name].double() - truth[name]).abs().max() for run in runs] for name in truth}
            worst = {name: runs[max(range(len(runs)), key=errors[name].__getitem__)][name] for name in truth}
            compare(found, worst, truth)

    return hold_to_budget


def reason_of(error: Exception) -> str:
    """Return the type of an error and the first line of its text, its numbers left out."""
    return f"{type(error).__name__}: {re.sub('[0-9]+', 'N', (str(error).splitlines() or [''])[0])}".strip()


# A cell that AdapterHub itself refuses runs none; `calls_per_layer` sees to the others.
@pytest.mark.no_kernels
def test_a_cell_is_as_without_the_patch(
    cell, make, without_the_patch, batch, results, hold_to_budget, calls_per_layer, tables
):
    inputs = batch(SAMPLES, 29)
    if cell.head == "multiple choice":
        inputs = {name: value.view(2, 2, -1) for name, value in inputs.items()}
    without = without_the_patch(cell, inputs)
    if isinstance(without, Exception):
        found, reason = NOT_POSSIBLE, reason_of(without)
        # An error that is not listed may be this test's own.
        assert tables.write or reason in tables.rows("adapterhub-errors")
        with pytest.raises(type(without)) as raised:
            results(make(cell, fused=True), inputs)
        assert reason_of(raised.value) == reason
        _reasons[reason] += 1
    else:
        model = make(cell, fused=True)
        dk.reset_stats()
        hold_to_budget(cell, inputs, results(model, inputs), without)
        calls_per_layer()
        found = "fused"
    _seen.setdefault((cell.composition, cell.model), Counter())[found] += 1


# pytest --every-case -n 0
@pytest.mark.every_case
def test_the_grid_is_listed(tables):
    # Of one process: others keep to themselves what they have seen.
    assert sum(map(Counter.total, _seen.values())) == len(grid.all_cells())
    for (composition, model), found in _seen.items():
        cell = ", ".join(f"{found[name]} {name}" for name in ("fused", NOT_POSSIBLE) if found[name])
        tables.report("adapterhub-grid", PACKAGES, composition, model, cell)
    for reason, count in sorted(_reasons.items()):
        tables.report("adapterhub-errors", PACKAGES, reason, "cells", str(count))


def test_the_sample_has_every_pair_of_choices():
    def pairs(cells: list[grid.Cell]) -> set[Any]:
        return {pair for cell in cells for pair in itertools.combinations(enumerate(cell), 2)}

    assert pairs(grid.pairwise()) == pairs(grid.all_cells())
    assert len(grid.pairwise()) < 250
