"""The native library is there, with every variant that this machine compiles and runs; other tests go by those.

It is used only if its structs are the package's.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_kernels import env, native
from deberta_kernels.native import params
from tests import needs


def test_it_is_loaded_where_it_can_be_built():
    needs.native_library()
    assert native.opened() is not None


def test_it_has_every_variant_that_was_compiled_and_that_the_processor_runs():
    needs.native_library()
    information = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not information.exists():
        pytest.skip("there is no list of this processor's instructions to compare with")
    lines = information.read_text().splitlines()
    processor = set(next(line for line in lines if line.startswith("flags")).split())
    status = native.library_status()
    record = json.loads((Path(status["path"]).parent / "build.json").read_text())
    assert record["variants"][0] == "generic"
    expected = [name for name in record["variants"] if processor.issuperset(env.ISA_FEATURES[name])]
    assert sorted(status["variants"]) == sorted(expected)
    assert set(record["variants"]) | set(record.get("left_out", {})) == set(env.isas_of("x86_64"))


def test_a_library_with_other_structs_is_refused(monkeypatch):
    needs.native_library()
    path = native.need().path
    first, second = params.AttentionParams._fields_[1:3]
    swapped = type(
        "AttentionParams", (ctypes.Structure,), {"_fields_": [("abi_version", ctypes.c_int64), second, first]}
    )
    monkeypatch.setattr(params, "_STRUCTS", (swapped, *params._STRUCTS[1:]))
    with pytest.raises(OSError, match="its structs are not those of the package"):
        native.Library(path)


def test_a_library_of_another_version_is_refused(monkeypatch):
    needs.native_library()
    path = native.need().path
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(OSError, match="it was built from another version of the package"):
        native.Library(path)


def test_every_field_of_a_struct_is_compared():
    described = params.layouts().splitlines()
    assert [line.split()[0] for line in described] == ["AttentionParams", "LinearParams", "DropoutParams"]
    assert all(len(line.split()) - 2 == len(struct._fields_) for line, struct in zip(described, params._STRUCTS))
    assert " q_stride_b@72 " in described[0]
    assert described[2].endswith(" scale@88'")


def test_a_struct_of_another_call_is_refused():
    needs.native_library()
    with pytest.raises(ctypes.ArgumentError):
        native.need().call("dk_cpu_forward", native.LinearParams())


def test_it_loads_on_systems_from_2018_on():
    """What it asks of glibc stands in it by name; 2.28 is that of RHEL 8 and Debian 10."""
    needs.native_library()
    asked = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", Path(native.need().path).read_bytes())
    assert asked
    assert max((int(a), int(b)) for a, b in asked) <= (2, 28)


_TEAM = """
import sys, torch, deberta_kernels as dk
from deberta_kernels import native
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
torch.set_num_threads(2)
before, x = runtimes(), torch.ones(1, 2, 300, 64)
dk.disentangled_attention(x, x, x, backend="cpu")
tasks = len(list(__import__("pathlib").Path("/proc/self/task").iterdir()))
print(native.need().team_runner is not None, runtimes() == before, tasks)
torch.ones(1 << 20).add_(1)
print(len(list(__import__("pathlib").Path("/proc/self/task").iterdir())) - tasks)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_its_threads_are_those_of_pytorch():
    needs.native_library()
    done = subprocess.run([sys.executable, "-c", _TEAM], capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    has_runner, one_runtime, tasks = said[0].split()
    assert (has_runner, one_runtime) == ("True", "True")
    assert int(tasks) > 1
    assert said[1] == "0"  # PyTorch's own kernel finds its threads there


_ANSWERING = """
import ctypes, sys, torch
from deberta_kernels import native
other = ctypes.cast(ctypes.CDLL(sys.argv[1]).GOMP_parallel, ctypes.c_void_p).value
print(native.need().team_runner == other)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="no LD_PRELOAD or no C++ compiler")
def test_a_runtime_that_is_loaded_before_answers_it_as_it_answers_pytorch(tmp_path):
    """As by LD_PRELOAD=libiomp5.so: there would be two pools of threads otherwise."""
    needs.native_library()
    source, library = tmp_path / "other.cpp", tmp_path / "libother.so"
    source.write_text(
        'extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned, unsigned) { work(data); }'
    )
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    for preloaded, expected in ((str(library), "True"), ("", "False")):
        environment = {**os.environ, "LD_PRELOAD": preloaded}
        command = [sys.executable, "-c", _ANSWERING, str(library)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr


def test_it_computes_on_one_thread_beside_a_pytorch_without_openmp(monkeypatch):
    needs.native_library()
    monkeypatch.setattr(native, "_team_runner", lambda: None)
    assert native.Library(native.need().path).threads() == 1
    native.need().handle.dk_set_team_runner(native.need().team_runner)
