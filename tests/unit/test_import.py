"""Importing the package: nothing heavy, no thread, no device, no native library, little time."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import deberta_kernels as dk

PROBE = """
import json, sys, threading, time
import torch


def threads():
    try:
        with open("/proc/self/status") as lines:
            return int(next(line for line in lines if line.startswith("Threads:")).split()[1])
    except OSError:
        return threading.active_count()


def native_library_is_mapped():
    try:
        with open("/proc/self/maps") as lines:
            return any("deberta_kernels" in line for line in lines)
    except OSError:
        return None


modules, before, start = set(sys.modules), threads(), time.process_time()
import deberta_kernels as dk
dk.disentangled_attention
dk.stats()
seconds = time.process_time() - start
print(json.dumps({
    "heavy": sorted({"triton", "transformers", "adapters", "peft", "torch._dynamo"} & (set(sys.modules) - modules)),
    "threads": threads() - before,
    "cuda": torch.cuda.is_initialized(),
    "native": native_library_is_mapped(),
    "seconds": seconds,
}))
"""


@pytest.fixture(scope="module")
def found():
    """What importing the package, and reaching its functional interface, did to a fresh process that has torch."""
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_import_loads_no_optional_package_and_no_compiler(found):
    assert found["heavy"] == []


def test_import_starts_no_thread_and_initialises_no_device(found):
    assert found["threads"] == 0
    assert not found["cuda"]


def test_import_does_not_load_the_native_library(found):
    if found["native"] is None:
        pytest.skip("there is no /proc to read")
    assert not found["native"]


def test_import_takes_less_than_a_tenth_of_a_second_over_torch(found):
    assert found["seconds"] < 0.1


def test_import_of_the_package_alone_does_not_import_torch():
    code = "import sys, deberta_kernels; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_public_names_are_listed_and_load():
    assert {
        "disentangled_attention",
        "disentangled_attention_varlen",
        "DisentangledSelfAttention",
        "patch",
        "unpatch",
    } <= set(dir(dk))
    assert {"patch_all", "unpatch_all", "PatchReport", "explain", "stats", "reset_stats", "__version__"} <= set(
        dk.__all__
    )
    for name in dk.__all__:
        if name not in ("DisentangledSelfAttention", "patch", "unpatch", "patch_all", "unpatch_all", "PatchReport"):
            assert getattr(dk, name) is not None
    assert dk.__version__ == "0.1.0"


@pytest.mark.parametrize(
    "name", ["DisentangledSelfAttention", "patch", "unpatch", "patch_all", "unpatch_all", "PatchReport"]
)
def test_model_names_load(name):
    assert callable(getattr(dk, name))


def test_what_is_loaded_late_is_what_type_checkers_see_and_what_a_star_gives():
    tree = ast.parse(Path(dk.__file__).read_text(encoding="utf-8"))
    (checked,) = [x for x in tree.body if isinstance(x, ast.If)]
    homes = {alias.name: f".{x.module}" for x in checked.body for alias in x.names}
    assert homes == dk._HOME
    assert sorted([*homes, "__version__"]) == sorted(dk.__all__)
    given: dict[str, object] = {}
    exec("from deberta_kernels import *", given)
    assert set(dk.__all__) <= set(given)
    assert given["patch"] is dk.patch


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'deberta_kernels' has no attribute 'attention_is_all'"):
        getattr(dk, "attention_is" + "_all")


def test_patch_all_without_transformers_names_the_package_and_the_remedy(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'package transformers.*pip install "deberta_kernels\[transformers\]"'):
        dk.patch_all()
