"""Which of the collected tests run: all that this machine can run, or samples of them where time is short."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest

from deberta_kernels.testing.backends import Target
from tests import needs

__all__ = ["able", "keep", "promised_gap", "sampled", "target_of"]


def target_of(item: pytest.Item) -> Target | None:
    """Return the target that a test was collected for, or None where it has no such parameter."""
    return _parameters(item).get("target")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def promised_gap(target: Target, parameters: dict[str, Any]) -> str | None:
    """Return why a target cannot run a test with these parameters, as far as they say."""
    case = parameters.get("case")
    dtype = parameters.get("dtype", getattr(case, "dtype", None))
    gap = target.gap(None, dtype)
    if gap is not None:
        return gap
    return None if case is None else target.case_skip_reason(case.batch, case.heads, case.nq, case.keys)


def able(item: pytest.Item) -> bool:
    """Tell whether a test is about packages that are here, and about what its target promises."""
    if any(needs.missing(name) for mark in item.iter_markers("packages") for name in mark.args):
        return False
    target = target_of(item)
    if target is None:
        return True
    suits = all(suit(target) for mark in item.iter_markers("targets") for suit in mark.args)
    return suits and promised_gap(target, _parameters(item)) is None


def sampled(
    items: Iterable[pytest.Item], key: Callable[[pytest.Item], Hashable | None], count: int
) -> list[pytest.Item]:
    """Return the items in their order, about `count` of those that share a key; all of those whose key is None."""
    items = list(items)
    groups: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    chosen = set(groups.pop(None, []))
    for group in groups.values():
        # A step that shifts by one each time, so that no inner parameter keeps a single value.
        step = -(-len(group) // count)
        chosen.update(item for i, item in enumerate(group) if i % step == i // step % step)
    return [item for item in items if item in chosen]


def keep(config: pytest.Config, items: list[pytest.Item], kept: Iterable[pytest.Item]) -> None:
    """Deselect all items but those that are kept, in the order of the items."""
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
