"""The tables of docs/support.md that the package itself can tell: backends, processors, versions.

    python tools/documentation/support.py         # writes them into docs/support.md

Those of heads are written by tests/integrations/test_support.py, with each transformers of its own.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import deberta_kernels as dk  # noqa: E402
from deberta_kernels import dtypes, env  # noqa: E402
from deberta_kernels.backends import REGISTRY  # noqa: E402
from deberta_kernels.impl import cpu, triton  # noqa: E402
from deberta_kernels.impl.cuda import modules  # noqa: E402
from deberta_kernels.testing.backends import TARGETS  # noqa: E402

__all__ = ["DOCUMENT", "TABLES", "main", "written"]

DOCUMENT = ROOT / "docs" / "support.md"
Rows = list[list[str]]


def computed(backend: str) -> tuple[str, ...]:
    """Return the names of the dtypes that a backend computes, as the tests hold it to them."""
    if backend == "reference":
        return tuple(map(dtypes.name, dtypes.FLOATS))
    return next(tuple(map(dtypes.name, target.dtypes)) for target in TARGETS if target.name == backend)


def head_sizes(backend: str) -> tuple[str, str]:
    """Return which head dimensions a backend computes forward, and with gradients of its own."""
    if backend == "cuda":
        forward, backward = (modules.HEAD_DIMS[which] for which in ("forward", "backward"))
        return " and ".join(map(str, forward)), " and ".join(map(str, backward))
    most = {"cpu": cpu._MAX_HEAD_DIM, "triton": triton._MAX_HEAD_DIM}.get(backend)
    return (f"up to {most}",) * 2 if most else ("any", "any")


def backends() -> Rows:
    """Return a row for each backend: where it runs and what it computes."""
    rows = [["backend", "runs on", *map(dtypes.name, dtypes.FLOATS), "head sizes", "gradients", "taken by `auto`"]]
    for name, row in REGISTRY.items():
        places = {"cpu": "CPU", "cuda": "GPU"}
        on = ", ".join(places[device] for device in row.devices) if row.devices else "any device"
        forward, backward = head_sizes(name)
        gradients = "to any order" if row.own_graph else "yes"
        if row.gradients is not None:
            gradients = f"head size {backward}; others by `{row.gradients}`"
        yes = ["yes" if dtypes.name(dtype) in computed(name) else "no" for dtype in dtypes.FLOATS]
        rows.append([f"`{name}`", on, *yes, forward, gradients, "no" if row.by_name_only else "yes"])
    return rows


CALLS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "padding, (B, N)": {"attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    "pairs, (B, 1, N, N)": {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool)},
    "pairs of each head, (B, H, N, N)": {"attention_mask": torch.ones(2, 3, 5, 5, dtype=torch.bool)},
    "dropout of probabilities": {"dropout_p": 0.1},
    "a prefix without positions": {"prefix_length": 2},
    "packed sequences": {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "max_seqlen": 3},
}


def calls() -> Rows:
    """Return a row for each kind of call: in how many of its dtypes each backend of this machine computes it."""
    here = ("reference", "torch", "cpu")
    rows = [["", *(f"`{backend}`" for backend in here)]]
    for kind, options in CALLS.items():
        rows.append([kind, *(answer(backend, options) for backend in here)])
    return rows


def answer(backend: str, options: dict[str, Any]) -> str:
    """Return what of a kind of call a backend computes, in all of its dtypes."""
    named = [dtype for dtype in dtypes.FLOATS if dtypes.name(dtype) in computed(backend)]
    parts = [
        part
        for part, grad in (("forward", False), ("gradients", True))
        if all(runs(backend, options, x, grad) for x in named)
    ]
    return ", ".join(parts) or "no"


def runs(backend: str, options: dict[str, Any], dtype: torch.dtype, gradients: bool) -> bool:
    """Tell whether a backend computes a small call."""
    packed = "cu_seqlens" in options
    q = torch.ones((5, 3, 16) if packed else (2, 3, 5, 16), dtype=dtype, requires_grad=gradients)
    table = torch.ones(3, 512, 16, dtype=dtype)
    function = dk.disentangled_attention_varlen if packed else dk.disentangled_attention
    try:
        out = function(q, q, q, table, table, backend=backend, **options)
    except NotImplementedError:
        return False
    if gradients:
        out.sum().backward()
    return bool(torch.isfinite(out).all()) and (not gradients or bool(torch.isfinite(q.grad).all()))


def processors() -> Rows:
    """Return a row for each variant of the native library, and for the GPUs that kernels are compiled for."""
    rows = [["processor", "what is used", "backend"]]
    for name, features in env.ISA_FEATURES.items():
        used = ", ".join(f"`{feature}`" for feature in features) or "nothing beyond the baseline"
        rows.append([f"CPU, variant `{name}`", used, "`cpu`"])
    capabilities = ", ".join(f"{major}.{minor}" for major, minor in triton._CAPABILITIES)
    rows.append([f"NVIDIA GPU, compute capability {capabilities}", "tensor cores", "`triton`"])
    rows.append(
        [
            "NVIDIA GPU, compute capability " + ".".join(map(str, modules.CAPABILITY)),
            "its copy engine and `wgmma`",
            "`cuda`",
        ]
    )
    rows += [[f"AMD GPU, {architecture}", "matrix units", "`triton`"] for architecture in triton._ARCHITECTURES]
    rows.append(["anything else that PyTorch runs on", "PyTorch's products", "`torch`"])
    return rows


def versions() -> Rows:
    """Return the versions of what the package runs with: the oldest and the newest that is tested."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    found = {
        "Python": (pythons[0], pythons[-1]),
        "PyTorch": tuple(re.findall(r"^TORCH_(?:OLDEST|NEWEST) \?= torch==(\S+)", make, re.M)),
        "transformers": (
            *re.findall(r"^OLDEST_PINS = .*transformers==(\S+)", make, re.M),
            *re.findall(r"^NEWEST_PINS = .*transformers==(\S+)", make, re.M),
        ),
        "Triton": tuple(sorted(re.findall(r"^TRITON(?:_OLDEST)? \?= (\S+)", make, re.M))),
    }
    return [["", "oldest tested", "newest tested"], *([name, *two] for name, two in found.items())]


TABLES = {"versions": versions, "backends": backends, "calls": calls, "processors": processors}


def written(text: str) -> str:
    """Return the document with its tables as they are now."""
    for name, rows in TABLES.items():
        head, *body = rows()
        lines = [head, ["---"] * len(head), *body]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        pattern = re.compile(rf"(<!-- written {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"{DOCUMENT.name} must have <!-- written {name} --> and <!-- end -->, got neither.")
        text = pattern.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)  # noqa: B023
    return text


def main() -> int:
    """Write the tables."""
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(DOCUMENT.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
