"""`info` as text."""

from __future__ import annotations

from typing import Any

from deberta_kernels import env
from deberta_kernels.backends import order

__all__ = ["as_text"]


def as_text(found: dict[str, Any]) -> str:
    """Return what `info` found as readable lines."""
    cpu, library = found["cpu"], found["library"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    lines = [
        f"deberta_kernels {found['version']}" + (f", commit {found['commit']}" if found["commit"] else ""),
        f"  python       {found['python']}",
        f"  system       {found['os']}, {found['platform']}" + (f", glibc {found['glibc']}" if found["glibc"] else ""),
        f"  packages     {packages}",
        *([f"  torch        {found['torch']}"] if found["torch"] else []),
        f"  processor    {_processor_line(cpu)}",
        f"  features     {' '.join(cpu['features']) or 'unknown'}",
        f"  threads      {_threads_line(cpu)}",
        f"  library      {_library_line(library)}",
        f"  variants     {', '.join(library['variants']) or 'none'}",
        f"  build        {_build_line(library['build'])}",
        f"  gpu          {'; '.join(found['gpus']) or 'none'}",
        f"  cuda         {_cuda_line(found['cuda'])}",
    ]
    if found["self_test"] is not None:
        lines.append(f"  self-test    {_self_test_line(found['self_test'])}")
    return "\n".join([*lines, *_backend_lines(found), *_settings("environment", found), *_settings("settings", found)])


def _processor_line(cpu: dict[str, str]) -> str:
    return cpu["name"] if cpu["name"] == cpu["model"] else f"{cpu['name']}; it calls itself {cpu['model']}"


def _threads_line(cpu: dict[str, Any]) -> str:
    of_torch = "" if cpu["threads"] is None else f"{cpu['threads']} used by torch ({cpu['torch_isa']}); "
    allowed = f" (numbers {cpu['affinity']})" if cpu["affinity"] else ""
    limit = "" if cpu["quota"] is None else f", and the time of {cpu['quota']:g} (the container's limit)"
    return f"{of_torch}this process may use {cpu['cores']} of {cpu['logical']} processors{allowed}{limit}"


def _library_line(library: dict[str, Any]) -> str:
    if library["loaded"]:
        slower = f" ({library['slower']})" if library["slower"] else ""
        return f"loaded, {library['isa']} variant{slower}, {library['path']}"
    return f"not loaded: {library['reason']}" + (f" ({library['path']})" if library["path"] else "")


def _build_line(build: dict[str, Any]) -> str:
    if build["not_built"]:
        return f"not built: {build['not_built']}"
    if not build["digest"]:
        return "not recorded"
    compiler = build["compiler_version"] or " ".join(build["compiler"] or ["an unknown compiler"])
    without = f", without {', '.join(build['left_out'])}" if build["left_out"] else ""
    return f"{compiler}, digest {str(build['digest'])[:16]}{without}"


def _cuda_line(cuda: dict[str, Any]) -> str:
    if not cuda["devices"]:
        state = cuda["driver"]
    else:
        state = f"driver for CUDA {cuda['driver']}, devices of compute capability {', '.join(cuda['devices'])}"
    if not cuda["built"] and not cuda["nvrtc"]:
        return str(state)
    nvrtc = f"NVRTC {cuda['nvrtc']}" if cuda["nvrtc"][:1].isdigit() else cuda["nvrtc"]
    modules = f"{len(cuda['built'])} modules built with the package" if cuda["built"] else "no module built, " + nvrtc
    return f"{state}; {modules}"


def _self_test_line(state: dict[str, Any]) -> str:
    if state["on"] is not True:
        return state["on"] or f"off, {env.SELF_TEST}=0: GPU kernels answer on any device"
    covered = f"committed results cover {state['covered'] or 'no'} devices"
    return f"on at the first use on a GPU; {covered}, {state['kept']} variants are proven on this machine"


def _backend_lines(found: dict[str, Any]) -> list[str]:
    if found["torch"] is not None:
        return ["  backends     none runs without torch"]
    lines = ["  backends     for a float32 call on the CPU:"]
    for name, reason in found["backends"].items():
        chosen = " (backend='auto' takes this one)" if name == found["auto"] else ""
        lines.append(f"    {name:<10} {'can run' + chosen if reason is None else 'cannot run: ' + reason}")
    chosen = ", ".join(f"{dtype}: {name}" for dtype, name in found["chosen"]["cpu"].items())
    asked = "`deberta-kernels explain --device cuda` compiles and asks them"
    return [
        *lines,
        f"  on the CPU   {chosen}",
        f"  on a GPU     tried in this order: {', '.join(order('cuda'))}; {asked}",
    ]


def _settings(key: str, found: dict[str, Any]) -> list[str]:
    return [f"  {key:<12} none set" if not found[key] else f"  {key}", *(f"    {k}={v}" for k, v in found[key].items())]
