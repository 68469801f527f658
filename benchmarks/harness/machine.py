"""The machine, the software and the rates they reach: without these a ratio cannot be compared."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.process import ROOT
from benchmarks.harness.work import GEOMETRY
from deberta_kernels import env
from deberta_kernels.native import processor

__all__ = ["commit", "describe", "device_name", "library", "own_peak", "package_versions", "rates", "versions"]

# The first linear of the feed-forward layer of v3-base at 512 tokens.
ROWS, INNER, COLUMNS = 512, GEOMETRY.hidden, GEOMETRY.intermediate
PACKAGES = ("transformers", "numpy", "onnx", "onnxruntime", "openvino", "adapters", "peft")
# What the variants of the native library use, and what else makes products faster: PyTorch's, or those of ARM.
FLAGS = (*dict.fromkeys(itertools.chain(*env.ISA_FEATURES.values())), "avx512_vnni", "amx_bf16")


def describe() -> dict[str, Any]:
    """Return what identifies the processor and how busy the machine is; nothing that identifies its owner."""
    info, flags = processor.described(), processor.features()
    return {
        "processor": processor.model(),
        "family": info.get("cpu family", ""),
        "model": info.get("model", ""),
        "stepping": info.get("stepping", ""),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": "hypervisor" in flags,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level} {kind.lower()}"] = size
    return found


def device_name() -> str:
    """Return a folder name for results: the processor, with family and model since clouds hide the name."""
    info = processor.described()
    name = re.sub(r"\(r\)|\(tm\)|@.*|\bcpu\b|\bprocessor\b", " ", processor.model().lower())
    parts = [re.sub(r"[^a-z0-9]+", "-", name).strip("-")]
    if "cpu family" in info:
        parts.append(f"family{info['cpu family']}-model{info.get('model', '')}")
    return "-".join(parts)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each distribution, or "not installed"."""
    found = dict.fromkeys(names, "not installed")
    for name in found:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions() -> dict[str, str]:
    """Return the versions that can move a number."""
    found = {"python": platform.python_version(), "torch": torch.__version__, **package_versions(PACKAGES)}
    found["onednn"] = str(torch.backends.mkldnn.is_available())
    found["mkl"] = str(torch.backends.mkl.is_available())
    found["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    return found


def commit() -> dict[str, Any]:
    """Return the commit of the checkout and whether tracked files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "deberta_kernels", "csrc", "setup.py")
    return {"id": git("rev-parse", "HEAD"), "modified": None if changed is None else bool(changed)}


def library() -> dict[str, Any]:
    """Return `library_status()` and whether its sources have changed, or why there is none."""
    try:
        status = dict(importlib.import_module("deberta_kernels.native").library_status())
    except (ImportError, AttributeError) as error:
        return {"loaded": False, "path": None, "reason": str(error), "isa": None, "variants": [], "stale": False}
    return {**status, "stale": bool(status.get("path")) and _is_stale(Path(status["path"]))}


def _is_stale(path: Path) -> bool:
    """Tell whether a build would now make another library than the one at this path; False without a compiler."""
    specification = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "native_build.py")
    assert specification is not None
    assert specification.loader is not None
    build = sys.modules[specification.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    layout = build.Layout(library=path)
    try:
        wanted = build.digest(layout, build.find_compiler(), sysconfig.get_platform())
    except build.BuildError:
        return False
    return bool(build.read_record(layout.record).get("digest") != wanted)


_highest: dict[str, float] = {}


def own_peak(dtype: str, repeats: int = 3) -> float | None:
    """Return the GFLOP/s of the kernel's own micro-kernel on a problem that stays in the L1 cache, or None.

    The highest this process has seen so far, after some repeats more: a neighbour on the machine can only lower it, and
    a low peak would flatter the kernel.
    """
    try:
        rate = importlib.import_module("deberta_kernels.native").gemm_rate
        seen = max(float(rate(getattr(torch, dtype))) for _ in range(repeats))
    except (ImportError, AttributeError, RuntimeError, NotImplementedError):
        return None
    _highest[dtype] = max(seen, _highest.get(dtype, 0.0))
    return _highest[dtype]


def rates(pace: Pace, threads: int = 1) -> dict[str, float | None]:
    """Measure GFLOP/s of matrix products: what the ratios against SDPA depend on.

    SDPA uses torch's own matrix product; the fused kernel its own. Where AVX-512 runs at full rate, or where MKL
    takes a slower path, the same kernel stands differently against SDPA. The own micro-kernel runs on one thread.
    """
    a, b = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)
    weight, bias = b.t().contiguous(), torch.zeros(COLUMNS)
    a16, weight16 = a.bfloat16(), weight.bfloat16()
    calls = {
        "torch mm float32": lambda _: a @ b,
        "torch linear float32": lambda _: nn.functional.linear(a, weight, bias),
        "torch linear bfloat16": lambda _: nn.functional.linear(a16, weight16),
    }
    if torch.backends.mkldnn.is_available():
        pointwise = torch.ops.mkldnn._linear_pointwise
        calls["oneDNN linear float32"] = lambda _: pointwise(a, weight, bias, "none", [], "")
    with torch.no_grad():
        samples = interleave(calls, pace)
    flops = 2.0 * ROWS * INNER * COLUMNS
    found: dict[str, float | None] = {
        name: round(flops / (s.minimum if threads == 1 else s.wall_minimum) / 1e9, 1) for name, s in samples.items()
    }
    for dtype in ("float32", "bfloat16"):
        peak = own_peak(dtype)
        found[f"own micro-kernel {dtype}"] = None if peak is None else round(peak, 1)
    return found
