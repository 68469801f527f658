"""What a machine cannot run is left out, what it should have is not, and the fast loop tries every area."""

from types import SimpleNamespace

import pytest
import torch

from deberta_kernels.testing import backends
from deberta_kernels.testing.inputs import Case
from tests import fast, needs, selection

TORCH, GENERIC = (next(t for t in backends.TARGETS if t.name == name) for name in ("torch", "cpu_generic"))


class Item:
    """A collected test, as far as a selection looks at it."""

    def __init__(self, file="unit/test_masks.py", function="test", marks=(), **parameters):
        self.path = fast.TESTS / file
        self.function = function
        self.callspec = SimpleNamespace(params=parameters)
        self._marks = [mark.mark for mark in marks]

    def iter_markers(self, name):
        return [mark for mark in self._marks if mark.name == name]


def test_tests_of_a_package_that_is_missing_are_left_out_unless_it_is_required(monkeypatch):
    name = "a_package_that_nobody_has"
    item = Item(marks=[pytest.mark.packages("torch", name)])
    assert selection.able(Item(marks=[pytest.mark.packages("torch")]))
    assert not selection.able(item)
    monkeypatch.setattr(needs, "PACKAGES", {name: "test"})
    with pytest.raises(pytest.skip.Exception, match=rf"{name} is not installed \(make test\)"):
        needs.package(name)
    monkeypatch.setattr(needs, "required", {name})
    assert selection.able(item)
    with pytest.raises(ModuleNotFoundError, match=name):
        needs.package(name)


def test_targets_run_what_they_promise_and_what_a_test_is_about():
    assert selection.able(Item(target=TORCH, dtype=torch.float64))
    assert not selection.able(Item(target=GENERIC, dtype=torch.float64))
    assert not selection.able(Item(target=GENERIC, case=Case(dtype=torch.float64)))
    marks = [pytest.mark.targets(lambda target: target.thread_invariant)]
    assert selection.able(Item(target=GENERIC, marks=marks))
    assert not selection.able(Item(target=TORCH, marks=marks))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_samples_keep_the_order_and_change_inner_parameters(count):
    items = [Item(outer=outer, inner=inner) for outer in range(6) for inner in range(4)]
    others = [Item(function="other") for _ in range(3)]
    chosen = selection.sampled([*items, *others], lambda item: None if item.function == "other" else "test", count)
    assert chosen[-3:] == others
    assert items[0] in chosen
    assert [item for item in items if item in chosen] == chosen[:-3]
    assert len(chosen[:-3]) in (count, count - 1, count + 1)
    assert len({item.callspec.params["inner"] for item in chosen[:-3]}) >= min(count, 3) - 1


def test_every_file_of_the_fast_loop_is_there():
    assert {"checks", "masks", "position", "operators", "linear", "models"} <= set(fast.AREAS)
    for files in fast.AREAS.values():
        for file in files:
            assert (fast.TESTS / file).is_file(), f"{file} moved; mend AREAS of tests/fast.py"


def test_the_fast_loop_names_areas_and_targets_that_nothing_tries():
    items = [Item(files[0], target=TORCH) for files in fast.AREAS.values()]
    assert fast.gaps(items, [TORCH]) == []
    assert fast.gaps(items, [TORCH, GENERIC]) == ["cpu_generic"]
    assert fast.gaps([item for item in items if item.path.name != "test_bad_input.py"], []) == ["checks"]


def test_the_fast_loop_runs_a_few_cases_of_each_test_for_each_target():
    items = [Item(function=f, target=t, case=c) for f in "ab" for c in range(9) for t in (TORCH, GENERIC)]
    chosen = fast.sample(items)
    assert len(chosen) == 4 * fast.CASES
    assert {(item.function, item.callspec.params["target"].name) for item in chosen} == {
        (function, name) for function in "ab" for name in ("torch", "cpu_generic")
    }


@pytest.mark.parametrize(("seconds", "slow"), [(4.0 * (1 + fast.MOST), False), (4.1 * (1 + fast.MOST), True)])
def test_the_fast_loop_says_when_its_tests_have_become_slow(seconds, slow, monkeypatch):
    config = SimpleNamespace(args_source=pytest.Config.ArgsSource.TESTPATHS)
    written = []
    loop = fast.Fast(config, [])
    clock = iter([4.0, seconds])
    monkeypatch.setattr(fast.time, "process_time", lambda: next(clock))
    loop.pytest_collection_finish()
    loop.pytest_terminal_summary(SimpleNamespace(write_line=lambda line, **unused: written.append(line)))
    monkeypatch.undo()
    assert bool(written) == slow
    assert not slow or "--fast is no longer fast: its tests took 2.1 times as long" in written[0]
