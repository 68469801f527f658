"""Sentences for runs without data: those that come with the package, in the public domain."""

from __future__ import annotations

import re

from deberta_kernels.demo.text import paragraphs

__all__ = ["sentences"]


def sentences() -> list[str]:
    """Return sentences of at least four words, in their order."""
    parts = (part.strip() for text in paragraphs() for part in re.split(r"(?<=[.;:])\s+", text))
    return [" ".join(part.split()) for part in parts if len(part.split()) >= 4]
