"""The software a report needs: Python, packages, system, commit. Nothing is imported for it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["commit", "packages", "python", "system"]

_PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "adapters", "gliner", "sentence-transformers", "numpy", "triton",
    "tokenizers", "huggingface-hub", "sentencepiece",
)  # fmt: skip
_GIT_SECONDS = 10


def python() -> str:
    """Return implementation, version and path of the running Python."""
    return f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})"


def system() -> dict[str, str | None]:
    """Return "platform", "os" (a distribution's own name) and "glibc" (None elsewhere)."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = f"{platform.system()} {platform.release()}"
    library, version = platform.libc_ver()
    return {"platform": platform.platform(), "os": name, "glibc": version if library == "glibc" else None}


def packages() -> dict[str, str | None]:
    """Return the version of each package that matters here, None where it is not installed."""
    return {name: _installed(name) for name in _PACKAGES}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit that this code is of, with "-dirty" where files differ; None where nothing tells."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return _installed_commit()
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _installed_commit() -> str | None:
    """Return the commit that pip installed from a repository."""
    try:
        text = importlib.metadata.distribution("deberta-kernels").read_text("direct_url.json")
        found: Any = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
