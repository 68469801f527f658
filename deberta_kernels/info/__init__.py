"""What is active on this machine, and why: what one pastes into a report. Torch is described, and not needed."""

from __future__ import annotations

from typing import Any

import deberta_kernels
from deberta_kernels import env
from deberta_kernels.info import active, machine, software
from deberta_kernels.info.text import as_text

__all__ = ["format_info", "info"]


def info() -> dict[str, Any]:
    """Describe what is active on this machine, and why.

    Packages are looked up by their metadata and, but for torch, never imported; the native library is loaded, because
    only that tells whether it works. The keys stay: programs may read them.

    Returns:
        "version", "commit": of this package; the commit is None outside a checkout and an install from one;
        "python", "platform", "os", "glibc": strings; "packages": {name: version or None}; "torch": why torch does not
        import, or None; "cpu": {"name": as people say it, "model", "features", "cores": that this process may use,
        "logical": of the machine, "affinity", "quota": of a container, "threads": torch's, "torch_isa"}; "library":
        {"loaded", "path", "reason", "isa", "variants", "compiled", "slower", "build": {"compiler",
        "compiler_version", "digest", "left_out", "not_built"}}; "gpus": their names; "cuda": what the CUDA kernels
        would be loaded from, see `impl.cuda.status`; "self_test": whether GPU kernels are tested on a device that has
        not been proven, see `proof.self_test.status`; "backends": {name: None if it runs a plain float32 call on the
        CPU, else why not}; "auto": the backend chosen for that call, or None; "chosen": {"cpu": {dtype: backend or
        None}}, GPUs left out, since their kernels would have to be compiled; "environment": the package's variables
        that are set; "settings": those of others that matter here.
    """
    problem = active.torch_problem()
    library = active.library()
    return {
        "version": deberta_kernels.__version__,
        "commit": software.commit(),
        "python": software.python(),
        **software.system(),
        "packages": software.packages(),
        "torch": problem,
        "cpu": {**machine.processor_found(), **active.torch_threads(problem)},
        "library": library,
        "gpus": machine.gpus() or active.gpus(problem),
        **active.backends(problem),
        "environment": env.variables_set(),
        "settings": env.settings_of_others(),
    }


def format_info() -> str:
    """Return `info` as readable text."""
    return as_text(info())
