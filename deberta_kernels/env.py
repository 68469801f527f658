"""Every environment variable of the package: its name, its meaning, and the one place that reads it."""

from __future__ import annotations

import os

__all__ = [
    "BACKEND",
    "CACHE",
    "CPU_ISA",
    "CPU_ISAS",
    "ISA_FEATURES",
    "LIBRARY",
    "SELF_TEST",
    "VARIABLES",
    "cache_folder",
    "cpu_isa",
    "forced_backend",
    "importing_from",
    "isas_of",
    "library_path",
    "multiplies_bfloat16",
    "self_tests",
    "settings_of_others",
    "triton_interpreted",
    "variables_set",
]

BACKEND = "DEBERTA_KERNELS_BACKEND"
CACHE = "DEBERTA_KERNELS_CACHE"
CPU_ISA = "DEBERTA_KERNELS_CPU_ISA"
LIBRARY = "DEBERTA_KERNELS_LIBRARY"
SELF_TEST = "DEBERTA_KERNELS_SELF_TEST"

# What os.environ keeps its variables in. Looking for one there takes a twentieth of the time, and every call looks.
_environ, _held = os.environ, getattr(os.environ, "_data", None)
_held_key = os.fsencode(BACKEND) if os.name == "posix" else BACKEND

# The variants of the native CPU library, fastest first, and the features of the processor that each uses beside the
# baseline, as Linux names them. The build makes the compiler's flags of this, and what the library asks the processor.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", *_AVX2)
# Compilers know BF16 beside ARMv8.2 only, which has the atomics of ARMv8.1.
ISA_FEATURES = {
    "avx512_bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": _AVX2,
    "neon_bf16": ("asimd", "atomics", "bf16"), "neon": ("asimd",), "generic": (),
}  # fmt: skip
CPU_ISAS = tuple(ISA_FEATURES)

VARIABLES = {
    BACKEND: "what backend='auto' means: the name of a backend; one that cannot run the call raises, as if the "
    "call had named it",
    CACHE: "folder for CUDA modules compiled on this machine and for what its self-tests found, instead of "
    "deberta_kernels in the user's cache folder",
    CPU_ISA: f"instruction set of the native CPU library: {', '.join(CPU_ISAS)}; read when the library is first used",
    LIBRARY: "path of the native CPU library to load instead of the installed one; read when it is first used",
    SELF_TEST: "0: GPU kernels answer on a device that has not been proven, without a self-test at the first use",
}

# Settings of OpenMP, oneDNN, PyTorch, Triton, CUDA and the hub that a report shows; none of them holds a secret.
_OTHER_PREFIXES = (
    "DEBERTA_KERNELS_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "ATEN_", "TRITON_", "MALLOC_",
)  # fmt: skip
_OTHERS = (
    "LRU_CACHE_CAPACITY", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM", "LD_PRELOAD",
)  # fmt: skip


def forced_backend() -> str | None:
    """Return the backend that `backend="auto"` must mean, or None when the choice is free."""
    if _held is not None and os.environ is _environ and _held_key not in _held:
        return None
    return os.environ.get(BACKEND) or None


def importing_from(folder: str) -> dict[str, str]:
    """Return the environment of a process that imports from a folder before it looks elsewhere."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}


def cache_folder() -> str | None:
    """Return the folder for compiled CUDA modules and self-tests, or None where no home directory is known."""
    if chosen := os.environ.get(CACHE):
        return chosen
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "deberta_kernels") if os.path.isabs(base) else None


def cpu_isa() -> str | None:
    """Return the instruction set the native CPU library must use, or None for the best the processor has.

    Raises:
        ValueError: the variable holds a name that no variant of the library has.
    """
    isa = os.environ.get(CPU_ISA) or None
    if isa is not None and isa not in CPU_ISAS:
        raise ValueError(f"{CPU_ISA} must be one of {', '.join(CPU_ISAS)}, got {isa!r}; unset it for the best variant.")
    return isa


def isas_of(machine: str) -> tuple[str, ...]:
    """Return the variants that a processor may have, fastest first.

    Args:
        machine: its family, as `platform.machine` names it.
    """
    if machine.lower() in ("x86_64", "amd64"):
        return tuple(isa for isa in CPU_ISAS if "asimd" not in ISA_FEATURES[isa])
    is_arm = machine.lower() in ("aarch64", "arm64")
    return tuple(isa for isa in CPU_ISAS if not ISA_FEATURES[isa] or (is_arm and "asimd" in ISA_FEATURES[isa]))


def multiplies_bfloat16(isa: str) -> bool:
    """Tell whether a variant has instructions for products of bfloat16 numbers."""
    return isa.endswith("_bf16")


def library_path() -> str | None:
    """Return the absolute path of the native CPU library to load instead of the installed one, or None.

    A name without a folder is a file in the current folder; the loader would look for it elsewhere.

    Raises:
        OSError: the path is relative and the current folder is gone.
    """
    path = os.environ.get(LIBRARY)
    return os.path.abspath(path) if path else None


def self_tests() -> bool:
    """Tell whether GPU kernels are tested at their first use on a device that has not been proven.

    Raises:
        ValueError: the variable holds something else than 0 or 1.
    """
    chosen = os.environ.get(SELF_TEST) or "1"
    if chosen not in ("0", "1"):
        raise ValueError(f"{SELF_TEST} must be 0 or 1, got {chosen!r}; unset it for the self-test.")
    return chosen == "1"


def triton_interpreted() -> bool:
    """Tell whether Triton interprets kernels, on the CPU; it reads its own variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def settings_of_others() -> dict[str, str]:
    """Return the variables of others that change speed or results, and unknown ones that look like the package's."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name not in VARIABLES and (name in _OTHERS or name.startswith(_OTHER_PREFIXES))
    }


def variables_set() -> dict[str, str]:
    """Return the package's environment variables that are set, with their values."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
