"""The loop of a few seconds, `make test-fast`: a sample that tries each area of the package."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from deberta_kernels.testing.backends import Target
from tests import needs, selection

__all__ = ["AREAS", "CASES", "MOST", "TESTS", "Fast", "gaps", "sample"]

# The areas of the package, and the files whose tests try them.
AREAS = {
    "calls": ("unit/test_api.py", "unit/test_dispatch.py"),
    "checks": ("unit/test_bad_input.py",),
    "masks": ("unit/test_masks.py", "ops/test_masks.py"),
    "position": ("unit/test_position.py",),
    "operators": ("ops/test_accuracy.py", "ops/test_gradients.py"),
    "linear": ("ops/test_linear.py", "integrations/test_fast_linears.py"),
    "documents": ("docs/test_links.py", "docs/test_names.py"),
    "models": ("integrations/test_parity.py", "integrations/test_packing.py"),
}
# Cases of each test, for each target.
CASES = 2
# What the tests are meant to take of the time of imports and collection: a slow machine is slow at both. Measured: 0.8.
MOST = 2.0

TESTS = Path(__file__).resolve().parent
_FILES = {TESTS / file: area for area, files in AREAS.items() for file in files}


def sample(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return a few cases of each test, for each target."""
    return selection.sampled(items, lambda item: (getattr(item, "function", item), selection.target_of(item)), CASES)


def gaps(items: Sequence[pytest.Item], targets: Iterable[Target]) -> list[str]:
    """Return the areas that no test tries, and the targets for which no test of the operators is there."""
    tried = {_FILES.get(item.path) for item in items}
    if needs.library_absence() is not None:  # All linear layers here are its own.
        tried.add("linear")
    operators = [item for item in items if _FILES.get(item.path) == "operators"]
    names = {target.name for item in operators if (target := selection.target_of(item)) is not None}
    return [area for area in AREAS if area not in tried] + [t.name for t in targets if t.name not in names]


class Fast:
    """The plugin of pytest --fast: without paths, only the files of `AREAS`; a sample of their tests."""

    def __init__(self, config: pytest.Config, targets: Sequence[Target]) -> None:
        self._whole = config.args_source is not pytest.Config.ArgsSource.ARGS
        self._targets = targets
        self._ready: float | None = None

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out what is in no area, before it is imported."""
        known = collection_path.is_dir() or collection_path in _FILES
        return True if self._whole and not known else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = sample(item for item in items if selection.able(item))
        if self._whole and (missing := gaps(chosen, self._targets)):
            raise pytest.UsageError(f"--fast tries no {', '.join(missing)}; mend AREAS of tests/fast.py")
        selection.keep(config, items, chosen)

    def pytest_collection_finish(self) -> None:
        self._ready = time.process_time()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say so when the sample has grown slow; no failure, since machines differ in what they are slow at."""
        if not self._whole or self._ready is None:
            return
        ratio = time.process_time() / self._ready - 1
        if ratio > MOST:
            terminalreporter.write_line(
                f"--fast is no longer fast: its tests took {ratio:.1f} times as long as imports and collection, more "
                f"than {MOST:.0f}; see --durations=10, and sample less in tests/fast.py",
                yellow=True,
            )
