"""NVRTC: which is taken, what it is given, and where its own parts are found."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from deberta_kernels.impl.attempts import is_passing
from deberta_kernels.impl.cuda import nvrtc

FAKE_NVRTC = r"""
#include <dlfcn.h>
#include <cstring>
#include <string>
static std::string made, log_text;
static int broken;
extern "C" {
int nvrtcVersion(int* major, int* minor) { return *major = MAJOR, *minor = 3, 0; }
int nvrtcCreateProgram(void** program, const char* source, const char* name, int count, const char* const* headers,
                       const char* const* names) {
  made = std::string(name) + ":" + source, broken = std::strstr(source, "broken") != nullptr;
  for (int i = 0; i < count; i++) made += std::string("|") + names[i] + ":" + headers[i];
  return *program = &made, 0;
}
int nvrtcCompileProgram(void*, int count, const char* const* options) {
  for (int i = 0; i < count; i++) made += std::string("|") + options[i];
  log_text = "forward.cu(1): error: broken on purpose\n";
  if (!dlopen("libnvrtc-builtins.so.12.3", RTLD_LAZY)) return log_text = dlerror(), 7;
  return broken ? 6 : std::strstr(made.c_str(), "no memory") ? 1 : 0;
}
int nvrtcDestroyProgram(void** program) { return *program = nullptr, 0; }
int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = log_text.size() + 1, 0; }
int nvrtcGetProgramLog(void*, char* text) { return std::strcpy(text, log_text.c_str()), 0; }
int nvrtcGetCUBINSize(void*, size_t* size) { return *size = made.size(), 0; }
int nvrtcGetCUBIN(void*, char* text) { return std::memcpy(text, made.data(), made.size()), 0; }
}
"""
COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")


def fake_nvrtc(tmp_path, major):
    """Build an NVRTC that opens its builtins by their bare name, which the loader does not know, as NVIDIA's does."""
    path, name = tmp_path / f"libnvrtc_{major}.so", f"libnvrtc-builtins.so.{major}.3"
    (tmp_path / "nvrtc.cpp").write_text(FAKE_NVRTC)
    (tmp_path / "builtins.cpp").write_text("")
    command = [COMPILER, "-shared", "-fPIC", f"-DMAJOR={major}", "-o", str(path), str(tmp_path / "nvrtc.cpp")]
    subprocess.run(command, check=True)
    command = [COMPILER, "-shared", f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(tmp_path / "builtins.cpp")]
    subprocess.run(command, check=True)
    return str(path)


@needs_compiler
def test_nvrtc_gets_sources_headers_and_options(tmp_path, monkeypatch):
    path = fake_nvrtc(tmp_path, 12)
    monkeypatch.setattr(nvrtc, "libraries", lambda: ["/nowhere/libnvrtc.so.13", path])
    compiler = nvrtc.Compiler()
    assert compiler.version == (12, 3)
    made = compiler.cubin({"a.h": "A", "main.cu": "M", "cstdint": "C"}, "main.cu", ("-x", "--std=c++17"))
    assert made == b"main.cu:M|a.h:A|cstdint:C|-x|--std=c++17"
    with pytest.raises(
        nvrtc.NvrtcError, match=r"nvrtcCompileProgram failed with status 6: .*error: broken on purpose$"
    ):
        compiler.cubin({"main.cu": "broken"}, "main.cu", ())
    with pytest.raises(nvrtc.NvrtcError, match="nvrtcCompileProgram failed with status 1") as caught:
        compiler.cubin({"main.cu": "no memory"}, "main.cu", ())
    assert is_passing(caught.value)


@needs_compiler
@pytest.mark.parametrize("beside", [True, False], ids=["beside it", "in a wheel"])
def test_nvrtc_finds_its_builtins_where_the_loader_does_not_look(tmp_path, beside, request):
    path = fake_nvrtc(tmp_path, 12)
    wheel = tmp_path / "site" / "nvidia" / "cuda_nvrtc" / "lib"
    wheel.mkdir(parents=True)
    if not beside:
        (tmp_path / "libnvrtc-builtins.so.12.3").rename(wheel / "libnvrtc-builtins.so.12.3")
    # In a process of its own: what another test has loaded stays loaded.
    program = (
        "from deberta_kernels.impl.cuda import nvrtc\n"
        f"nvrtc.libraries = lambda: [{path!r}]\n"
        "print(nvrtc.Compiler().cubin({'main.cu': 'M'}, 'main.cu', ()))"
    )
    search = os.pathsep.join([str(request.config.rootpath), str(tmp_path / "site")])
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "b'main.cu:M'", done.stderr


@needs_compiler
def test_an_old_nvrtc_is_as_good_as_none(tmp_path, monkeypatch):
    path = fake_nvrtc(tmp_path, 11)
    monkeypatch.setattr(nvrtc, "libraries", lambda: [path])
    with pytest.raises(nvrtc.NvrtcError, match="NVRTC is not there"):
        nvrtc.Compiler()


def test_nvrtc_of_torchs_own_cuda_is_tried_first(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert nvrtc.libraries()[:2] == ["libnvrtc.so.12", "libnvrtc.so.13"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert nvrtc.libraries()[:2] == ["libnvrtc.so.13", "libnvrtc.so.12"]
