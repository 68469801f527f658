"""The class for AdapterHub's models without a package that fits: an error that names what goes together."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys

import pytest

NAME = "deberta_kernels.integrations.adapters"
NEEDS = "needs adapters 1.3.0 .* with transformers 4.57.6"


@pytest.mark.parametrize("error", [ImportError, ModuleNotFoundError, RuntimeError])
def test_adapters_that_do_not_import_are_named_with_the_versions_that_fit(error, monkeypatch):
    real = builtins.__import__

    def broken(name, *arguments, **named):
        if name == "adapters":
            raise error("cannot import name 'HfFolder'")
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=rf"{NEEDS} .*HfFolder.*deberta_kernels\[adapters\].*use PEFT"):
        importlib.import_module(NAME)


def test_the_class_is_there_exactly_where_adapters_is():
    check = f"""
import warnings
warnings.simplefilter("ignore")
try:
    import adapters
    fits = True
except (ImportError, RuntimeError):
    fits = False
try:
    from {NAME} import DebertaV2AdapterModel
    assert fits and issubclass(DebertaV2AdapterModel, adapters.DebertaV2AdapterModel)
except ImportError as error:
    assert not fits and "use PEFT" in str(error), error
"""
    subprocess.run([sys.executable, "-c", check], check=True)


def test_patching_imports_no_adapters(build):
    check = """
import sys
import deberta_kernels as dk
dk.patch_all()
assert "adapters" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", check], check=True)
