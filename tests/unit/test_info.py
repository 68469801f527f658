"""info: what it reports, and that reporting imports nothing heavy and survives a broken installation."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import deberta_kernels
from deberta_kernels import dispatch, env, info, native
from tests import needs
from tests.checkout import ROOT


def test_reports_every_part():
    found = info.info()
    assert found["version"] == deberta_kernels.__version__
    assert found["packages"]["torch"]
    assert set(found["packages"]) >= {
        "torch", "transformers", "accelerate", "peft", "adapters", "gliner", "sentence-transformers", "numpy", "triton",
    }  # fmt: skip
    assert found["library"]["loaded"] == (found["library"]["reason"] is None)
    assert set(found["backends"]) == set(dispatch.BACKENDS)
    assert found["backends"]["reference"] is None
    assert found["backends"]["cuda"] == "it runs on cuda tensors, not cpu"
    assert set(found["cuda"]) >= {"driver", "devices", "built", "sources", "nvrtc"}
    assert found["cpu"]["threads"] >= 1
    assert found["cpu"]["cores"] <= found["cpu"]["logical"]
    assert found["chosen"]["cpu"]["float64"] == "torch"
    assert found["chosen"]["cpu"]["float32"] == found["auto"]
    assert json.loads(json.dumps(found)) == found


# Programs read them: a key may be added, none may go.
KEYS = {
    "version", "commit", "python", "platform", "os", "glibc", "packages", "torch", "cpu", "library", "gpus", "cuda",
    "self_test", "backends", "auto", "chosen", "environment", "settings",
}  # fmt: skip
KEYS_BELOW = {
    "cpu": {"name", "model", "features", "cores", "logical", "affinity", "quota", "threads", "torch_isa"},
    "library": {"loaded", "path", "reason", "isa", "variants", "compiled", "slower", "build"},
}
BUILD_KEYS = {"compiler", "compiler_version", "digest", "left_out", "not_built"}


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_the_keys_stay(monkeypatch, torch_is_there):
    if not torch_is_there:
        monkeypatch.setattr(info.active, "torch_problem", lambda: "torch is not installed")
    found = info.info()
    assert set(found) == KEYS
    assert {key: set(found[key]) for key in KEYS_BELOW} == KEYS_BELOW
    assert set(found["library"]["build"]) == BUILD_KEYS


def test_the_build_of_the_library_is_named():
    needs.native_library()
    build = info.info()["library"]["build"]
    assert re.fullmatch(r"[0-9a-f]{64}", build["digest"])
    assert build["compiler_version"]
    line = next(line for line in info.format_info().splitlines() if line.startswith("  build "))
    assert line.startswith(f"  build        {build['compiler_version']}, digest {build['digest'][:16]}")


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no checkout, or there is no git")
    said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(info.software.commit().removesuffix("-dirty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info.software.commit() is None  # without git


def test_the_commit_of_an_install_is_what_pip_recorded(monkeypatch, tmp_path):
    class Installed:
        text = None

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.text

    monkeypatch.setattr(
        info.software, "__file__", str(tmp_path / "site-packages" / "deberta_kernels" / "info" / "x.py")
    )
    monkeypatch.setattr(info.software.importlib.metadata, "distribution", lambda name: Installed())
    assert info.software.commit() is None
    for text, expected in (('{"vcs_info": {"commit_id": "abc"}}', "abc"), ('{"url": "x"}', None), ("[]", None)):
        Installed.text = text
        assert info.software.commit() == expected


def test_settings_of_others_are_shown_and_secrets_are_not(monkeypatch):
    shown = {
        "OMP_NUM_THREADS": "3",
        "KMP_AFFINITY": "compact",
        "MKL_NUM_THREADS": "2",
        "DEBERTA_KERNELS_BAKCEND": "cpu",
    }
    for name, value in {**shown, "HF_TOKEN": "hf_secret"}.items():
        monkeypatch.setenv(name, value)
    text = info.format_info()
    assert all(f"    {name}={value}\n" in text + "\n" for name, value in shown.items())
    assert "hf_secret" not in text


@pytest.mark.parametrize(
    ("numbers", "expected"), [([], ""), ([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 5], "0,2-3,5")]
)
def test_processors_are_listed_as_taskset_takes_them(numbers, expected):
    assert info.machine._ranges(numbers) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None), ("1 0", None), ("x y", None), (None, None)],
)
def test_the_limit_of_a_container_is_shown(content, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(info.machine, "_QUOTA", tmp_path / "cpu.max")
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert info.info()["cpu"]["quota"] == expected
    assert ("the time of 1.5 (the container's limit)" in info.format_info()) == (expected == 1.5)


def test_gpus_are_named_without_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(info.machine, "_NVIDIA", tmp_path)
    assert info.machine.gpus() == []
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 7\n")
    assert info.machine.gpus() == ["NVIDIA H200"]


def test_a_torch_that_does_not_import_is_a_line(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    problem = info.active.torch_problem()
    assert problem.startswith("torch does not import (OSError: libcudart.so.13: cannot open shared object file); ")


def test_text_names_every_backend_and_the_environment(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "torch")
    text = info.format_info()
    for name in dispatch.BACKENDS:
        assert f"    {name:<10} " in text
    assert "DEBERTA_KERNELS_BACKEND=torch" in text
    assert next(line for line in text.splitlines() if "torch      can run" in line).endswith("takes this one)")


def test_text_says_when_no_variable_is_set(monkeypatch):
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "environment  none set" in info.format_info()


def test_unusable_environment_variable_is_reported_not_raised(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "tpu")
    assert info.info()["auto"] is None
    assert "DEBERTA_KERNELS_BACKEND=tpu" in info.format_info()


def test_broken_backend_is_reported_not_raised(monkeypatch):
    class Broken:
        @staticmethod
        def refusal(problem):
            raise OSError("libgomp.so.1 is missing")

    def broken():
        raise AttributeError("no such symbol")

    monkeypatch.setitem(dispatch._loaded, "cpu", Broken)
    monkeypatch.setattr(native, "library_status", broken)
    found = info.info()
    assert "libgomp.so.1 is missing" in found["backends"]["cpu"]
    assert found["library"]["reason"] == "AttributeError: no such symbol"
    assert "not loaded: AttributeError" in info.format_info()


def test_packages_are_looked_up_not_imported():
    code = "import sys; from deberta_kernels import info; info.info(); print([m for m in ('transformers', 'triton', "
    code += "'adapters', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_forced_instruction_set_is_shown():
    needs.native_library()
    code = "from deberta_kernels import info; print(info.format_info())"
    environment = {**os.environ, env.CPU_ISA: "generic"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "loaded, generic variant" in result.stdout
    assert "DEBERTA_KERNELS_CPU_ISA=generic" in result.stdout


def test_gpus_are_counted_and_not_initialised(monkeypatch):
    import torch

    def refuse(*given):
        raise AssertionError("a process with an initialised GPU cannot be forked")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(info.machine, "gpus", list)
    assert info.info()["gpus"] == ["2 seen by torch"]
    assert "  gpu          2 seen by torch\n" in info.format_info()
