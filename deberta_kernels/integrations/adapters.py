"""AdapterHub's DeBERTa with fused attention: the class to import in place of `adapters.DebertaV2AdapterModel`."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from deberta_kernels.models.patching import patch

__all__ = ["DebertaV2AdapterModel"]

_NEEDED = {"adapters": "1.3.0", "transformers": "4.57.6"}


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


try:
    from adapters import DebertaV2AdapterModel as _DebertaV2AdapterModel
# The packages import lazily, and wrap what goes wrong on the way.
except (ImportError, RuntimeError) as error:
    raise ImportError(
        "deberta_kernels.integrations.adapters needs "
        + " with ".join(f"{name} {version} (here: {_installed(name)})" for name, version in _NEEDED.items())
        + f', and adapters does not import ({error}); pip install "deberta_kernels[adapters]", or stay with this '
        "transformers and use PEFT, whose models patch(model) fuses."
    ) from error


class DebertaV2AdapterModel(_DebertaV2AdapterModel):
    """AdapterHub's model with flexible heads and every adapter method, fused from its construction.

    All members are AdapterHub's; it saves and loads as its class does, and `unpatch(model)` leaves its class's code.

    Args:
        config: `DebertaV2Config`.
        options: as in `patch`; `from_pretrained` passes them on.

    Raises:
        TypeError: an unknown option, or as in `patch`.
        ValueError: as in `patch`.
        NotImplementedError: as in `patch`.
    """

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        patch(self, **options)
