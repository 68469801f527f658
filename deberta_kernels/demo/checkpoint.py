"""Can a model be had? Asked before anything is loaded: of a directory by its files, of the hub within seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from .arguments import DEFAULT_MODEL

__all__ = ["check_model", "hub_problem"]

MODEL_TYPES = ("deberta", "deberta-v2")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_LONGEST_ID = 96
_FORM = f"a directory with config.json and weights, or a hub id such as {DEFAULT_MODEL}"
# The hub's client retries for half a minute; it is asked once, in a process that can be given up.
_HUB_SECONDS = 10
_QUESTION = """
import sys
import huggingface_hub
name = sys.argv[1]
if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
    sys.exit(0)
if huggingface_hub.constants.HF_HUB_OFFLINE:
    sys.exit("HF_HUB_OFFLINE is set, so the hub is not asked")
try:
    huggingface_hub.model_info(name, timeout=4)
except huggingface_hub.errors.RepositoryNotFoundError:
    sys.exit("the hub has no such model, or it is private and `hf auth login` has not been run")
except Exception as error:
    sys.exit(f"the hub cannot be reached ({type(error).__name__})")
"""


def check_model(name: str) -> None:
    """Make sure that a model can be had.

    Args:
        name: directory or hub id.

    Raises:
        OSError: it cannot be found, or not be read.
        ValueError: it is no DeBERTa, or no name at all.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _check_directory(path)
    elif os.path.lexists(path):
        raise OSError(f"model {name!r} is a file; give the directory that it is in")
    elif _looks_like_a_path(name):
        raise OSError(f"model {name!r}: there is no such directory; give {_FORM}")
    elif not _HUB_ID.fullmatch(name) or len(name) > _LONGEST_ID:
        raise ValueError(f"model must be {_FORM}, got {name!r}")
    elif problem := hub_problem(name):
        raise OSError(
            f"model {name!r} is neither a directory ({path.absolute()}) nor to be had: {problem}; give {_FORM}"
        )


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1 or "\\" in name


def _check_directory(path: Path) -> None:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise OSError(f"model directory {path} cannot be read: {error.strerror}") from error
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise OSError(f"model directory {path} holds an adapter alone; merge it into its model and save that")
        held = f"it holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "it is empty"
        raise OSError(f"model directory {path} has no config.json ({held}); give {_FORM}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OSError(f"{path / 'config.json'} cannot be read: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        expected = " or ".join(map(repr, MODEL_TYPES))
        raise ValueError(f"{path / 'config.json'}: model_type must be {expected}, got {kind!r}; give a DeBERTa")
    if not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        raise OSError(f"model directory {path} has no weights (model.safetensors or pytorch_model.bin)")


def hub_problem(name: str) -> str | None:
    """Return why a model is neither in the hub's cache nor to be had from the hub, or None when it is."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _QUESTION, name],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
            errors="replace", timeout=_HUB_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the hub did not answer within {_HUB_SECONDS} s"
    said = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else said[-1] if said else f"its client ended with status {done.returncode}"
