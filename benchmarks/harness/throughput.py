"""Tokens per second of real texts: what tables, pictures and documents say of a result of `texts`."""

from __future__ import annotations

from typing import Any

from benchmarks.candidates import CANDIDATES, OTHER_MODELS

__all__ = ["OURS", "others_rows", "rate", "rows", "times_eager"]

OURS = ("patched", "patched-bfloat16", "patched-int8")


def rate(record: dict[str, Any], name: str, threads: int = 1, best: bool = False) -> float:
    """Return the real tokens per second of a candidate, by its median time; `best`: by its shortest."""
    key = ("wall_" if threads > 1 else "") + ("minimum" if best else "median")
    return float(record["tokens"][name] / record["samples"][name][key])


def times_eager(record: dict[str, Any], name: str, threads: int = 1) -> float:
    """Return how many times faster than eager a candidate is, texts in the order in which they come."""
    return rate(record, name, threads) / rate(record, "eager", threads)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return a row for each candidate, two columns for each case, with a head; what has no time is a word."""
    records, threads = result["texts"], result["settings"]["threads"]
    head = ["tokens per second"]
    for record in records:
        head += [record["title"], "times eager"]
    found = [[*head, "error"]]
    for name, candidate in CANDIDATES["texts"].items():
        row = [candidate.heading + (", another model" if name in OTHER_MODELS else "")]
        for record in records:
            row += _cells(record, name, threads)
        found.append([*row, _error(records, name)])
    return found


def _cells(record: dict[str, Any], name: str, threads: int) -> list[str]:
    if name in record["samples"]:
        return [f"{rate(record, name, threads):.0f}", f"{times_eager(record, name, threads):.1f}"]
    if not record["checks"].get(name, {"ok": True})["ok"]:
        return ["wrong", ""]
    return ["missing" if name in record["missing"] else "", ""]


def _error(records: list[dict[str, Any]], name: str) -> str:
    """Return the largest share of the answers that is error, of a dtype that is not exact; "" for the others."""
    shares = [record["checks"].get(name, {}).get("error_share") for record in records]
    known = [share for share in shares if share is not None]
    return f"{max(known):.1%}" if known else ""


def others_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of DeBERTa, BERT and ModernBERT side by side, times those of a patched DeBERTa."""
    records, threads = result["texts"], result["settings"]["threads"]
    found = [["tokens per second, float32", *(record["title"] for record in records)]]
    for name, title in (
        ("eager", "DeBERTa-v3-base, Hugging Face eager"),
        ("patched", "DeBERTa-v3-base, patched"),
        ("bert", "BERT-base, SDPA"),
        ("modernbert", "ModernBERT-base, SDPA"),
    ):
        found.append([title, *(_cells(record, name, threads)[0] for record in records)])
    return found
