"""info: what it reports, and that reporting imports nothing heavy and survives a broken installation."""

import json
import os
import subprocess
import sys

import deberta_kernels
from deberta_kernels import dispatch, env, info, native
from tests import needs


def test_reports_every_part():
    found = info.info()
    assert found["version"] == deberta_kernels.__version__
    assert found["packages"]["torch"]
    assert set(found["packages"]) == {"torch", "transformers", "adapters", "peft", "triton"}
    assert set(found["library"]) >= {"loaded", "path", "reason", "isa", "variants"}
    assert found["library"]["loaded"] == (found["library"]["reason"] is None)
    assert set(found["backends"]) == set(dispatch.BACKENDS)
    assert found["backends"]["reference"] is None
    assert found["backends"]["cuda"] == "it runs on cuda tensors, not cpu"
    assert set(found["cuda"]) >= {"driver", "devices", "built", "sources", "nvrtc"}
    assert found["cpu"]["threads"] >= 1
    json.dumps(found)


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
