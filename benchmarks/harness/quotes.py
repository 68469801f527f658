"""Figures quoted in a sentence: between `<!-- figure:NAME -->` and `<!-- /figure -->` stands what a result says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.candidates import CANDIDATES, OTHER_MODELS
from benchmarks.harness import tables, throughput
from benchmarks.registry import TEXTS

__all__ = ["QUOTED", "QUOTES", "replace_quotes"]

QUOTED = re.compile(r"<!-- figure:(\S+) -->(.*?)<!-- /figure -->", re.DOTALL)
Quote = Callable[[dict[str, Any]], str]


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _case(result: dict[str, Any], name: str) -> tuple[dict[str, Any], int]:
    return next(record for record in result["texts"] if record["name"] == name), result["settings"]["threads"]


def _ratio(case: str, ours: str, other: str) -> Quote:
    """Return the quote of a rate over another one, as they come."""

    def quote(result: dict[str, Any]) -> str:
        record, threads = _case(result, case)
        return _times(throughput.rate(record, ours, threads) / throughput.rate(record, other, threads))

    return quote


def _attention_memory(result: dict[str, Any]) -> str:
    longest = {"dtype": "float32", "length": 16384, "backward": False}
    found = next(x for x in result["memory"] if longest.items() <= x.items())
    return f"{found['bytes'] / tables.MEGABYTE:.0f} MB"


def _linear(result: dict[str, Any]) -> str:
    found = next(x for x in result["records"] if x["tokens"] == 512 and x["dtype"] == "float32")
    native, pytorch = (_seconds(found, name) for name in ("native", "pytorch"))
    return f"{native / pytorch:.0%}"


def _seconds(record: dict[str, Any], name: str) -> float:
    return float(record["seconds"][name] if "seconds" in record else record["samples"][name]["median"])


# Name in a document: kind of the result, and what it says.
QUOTES: dict[str, tuple[str, Quote]] = {
    **{f"{x.name}:{name}": ("texts", _ratio(x.name, name, "eager")) for x in TEXTS for name in CANDIDATES["texts"]},
    **{
        f"{x.name}:{ours}/{other}": ("texts", _ratio(x.name, ours, other))
        for x in TEXTS
        for ours in (*throughput.OURS, "eager")
        for other in (*OTHER_MODELS, "onnxruntime", "onnxruntime-int8", "openvino", "sorted")
    },
    "attention-memory": ("cpu", _attention_memory),
    "conditions:texts": ("texts", tables.cores),
    "linear-share": ("linear", _linear),
    "linear-processor": ("linear", tables.cores),
}


def replace_quotes(content: str, results: dict[str, dict[str, Any]]) -> str:
    """Return a document with the figures that the results have; those of other kinds stay.

    Raises:
        ValueError: a document names a figure that there is not.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in QUOTES:
            raise ValueError(f"there is no figure {name!r}; benchmarks/harness/quotes.py has those that can be quoted")
        kind, quote = QUOTES[name]
        if kind not in results:
            return match.group()
        return f"<!-- figure:{name} -->{quote(results[kind])}<!-- /figure -->"

    return QUOTED.sub(replaced, content)
