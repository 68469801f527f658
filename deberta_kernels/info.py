"""What is active on this machine, and why: versions, processor, native library, backends, environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import deberta_kernels
from deberta_kernels import dispatch, env, native
from deberta_kernels.native import processor
from deberta_kernels.proof import self_test

__all__ = ["format_info", "info"]

_PACKAGES = ("torch", "transformers", "adapters", "peft", "triton")

# The features that decide which variant of the native library runs.
_CPU_FEATURES = (*dict.fromkeys(x for isa in reversed(env.CPU_ISAS) for x in env.ISA_FEATURES[isa]), "asimd", "sve")


def info() -> dict[str, Any]:
    """Describe what is active on this machine, and why.

    Optional packages are looked up by their metadata and never imported; the native library is loaded, because only
    that tells whether it works.

    Returns:
        "version": of this package; "python", "platform": strings; "packages": {name: version or None};
        "cpu": {"model", "features", "cores", "threads"}; "library": {"loaded", "path", "reason", "isa", "variants"};
        "cuda": what the CUDA kernels would be loaded from, see `impl.cuda.status`; "self_test": whether GPU kernels
        are tested on a device that has not been proven, see `proof.self_test.status`;
        "backends": {name: None if it runs a plain float32 call on the CPU, else why not}; "auto": the backend chosen
        for that call, or None; "environment": the package's variables that are set.
    """
    explanation, refusals = _probe()
    return {
        "version": deberta_kernels.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "library": _library(),
        "cuda": _cuda(),
        "self_test": self_test.status(),
        "backends": refusals,
        "auto": explanation,
        "environment": env.variables_set(),
    }


def format_info() -> str:
    """Return `info` as readable text."""
    found = info()
    cpu, library = found["cpu"], found["library"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    lines = [
        f"deberta_kernels {found['version']}",
        f"  python       {found['python']}",
        f"  platform     {found['platform']}",
        f"  packages     {packages}",
        f"  processor    {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads used by torch",
        f"  features     {' '.join(cpu['features']) or 'unknown'}",
        f"  library      {_library_line(library)}",
        f"  variants     {', '.join(library['variants']) or 'none'}",
        f"  cuda         {_cuda_line(found['cuda'])}",
        f"  self-test    {_self_test_line(found['self_test'])}",
        "  backends     for a float32 call on the CPU:",
    ]
    for name, reason in found["backends"].items():
        chosen = " (backend='auto' takes this one)" if name == found["auto"] else ""
        lines.append(f"    {name:<10} {'can run' + chosen if reason is None else 'cannot run: ' + reason}")
    settings = [f"    {name}={value}" for name, value in found["environment"].items()]
    return "\n".join([*lines, "  environment  " + ("" if settings else "none set"), *settings])


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": processor.model(),
        "features": [feature for feature in _CPU_FEATURES if feature in processor.features()],
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def _library() -> dict[str, Any]:
    status: dict[str, Any] = {"loaded": False, "path": None, "reason": None, "isa": None, "variants": []}
    try:
        status |= native.library_status()
    except Exception as error:  # a broken installation is what this report is for
        status["reason"] = f"{type(error).__name__}: {error}"
    return status


def _library_line(library: dict[str, Any]) -> str:
    if library["loaded"]:
        return f"loaded, {library['isa']} variant, {library['path']}"
    return f"not loaded: {library['reason']}" + (f" ({library['path']})" if library["path"] else "")


def _cuda() -> dict[str, Any]:
    from deberta_kernels.impl import cuda

    try:
        return cuda.status()
    except Exception as error:
        return {"driver": f"{type(error).__name__}: {error}", "devices": [], "built": [], "sources": False, "nvrtc": ""}


def _cuda_line(cuda: dict[str, Any]) -> str:
    if not cuda["devices"]:
        state = cuda["driver"]
    else:
        state = f"driver for CUDA {cuda['driver']}, devices of compute capability {', '.join(cuda['devices'])}"
    nvrtc = f"NVRTC {cuda['nvrtc']}" if cuda["nvrtc"][:1].isdigit() else cuda["nvrtc"]
    modules = f"{len(cuda['built'])} modules built with the package" if cuda["built"] else "no module built, " + nvrtc
    return f"{state}; {modules}"


def _self_test_line(state: dict[str, Any]) -> str:
    if state["on"] is not True:
        return state["on"] or f"off, {env.SELF_TEST}=0: GPU kernels answer on any device"
    covered = f"committed results cover {state['covered'] or 'no'} devices"
    return f"on at the first use on a GPU; {covered}, {state['kept']} variants are proven on this machine"


def _probe() -> tuple[str | None, dict[str, str | None]]:
    """Ask every backend about one plain call."""
    import torch

    from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

    q, table = torch.zeros(1, 12, 8, 64), torch.zeros(12, 512, 64)
    problem = AttentionProblem(q, q, q, table, table, Masks(), PositionSpec(), 1.0, max_seqlen=8)
    refusals: dict[str, str | None] = {}
    for name in dispatch.BACKENDS:
        try:
            refusals[name] = dispatch.refusal(name, problem)
        except Exception as error:
            refusals[name] = f"{type(error).__name__}: {error}"
    try:
        return dispatch.explain(problem).chosen, refusals
    except Exception:  # an unusable environment variable is shown under "environment"
        return None, refusals
