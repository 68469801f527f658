"""Texts of a file: its lines, or a column of a CSV or JSON-lines file."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Texts", "TextsError", "read"]

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
# Names that only a column of texts has.
USUAL_NAMES = ("text", "texts", "sentence", "review", "content", "document", "comment", "prompt", "body")

# How files begin that are compressed: gzip, zip (.xlsx too), zstd, bzip2, xz; and Parquet.
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PAR1")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may have one; no tokenizer takes it


class TextsError(ValueError):
    """A file has no texts; the message says what it has and what to change."""


@dataclass(frozen=True)
class Texts:
    """The texts of a file.

    Attributes:
        texts: none is empty.
        column: where they stood; None in a file of lines.
        skipped: empty ones, which were left out.
        more: whether the file goes on after the limit.
    """

    texts: tuple[str, ...]
    column: str | None
    skipped: int
    more: bool


def read(path: Path, column: str | None, limit: int) -> Texts:
    """Read the texts of a file.

    Args:
        path: .csv, .tsv, .jsonl, .ndjson or .json (an object a line); any other name: a text a line.
        column: name of the column or the key; None where it is clear.
        limit: how many texts at most; 0 = all.

    Raises:
        TextsError: there is no such file or column, no text in it, or it is of another format.
    """
    kind = path.suffix.lower()
    if column is not None and kind not in SEPARATORS and kind not in JSON_LINES:
        raise TextsError(
            f"--column {column} needs a file with columns (.csv, .tsv, .jsonl), got {path}; leave --column out."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="" if kind in SEPARATORS else None) as file:
            if kind in SEPARATORS:
                column, rows = _of_csv(file, path, column, SEPARATORS[kind])
            elif kind in JSON_LINES:
                column, rows = _of_json(file, path, column)
            else:
                rows = file
            return _gathered(rows, path, column, limit)
    except OSError as error:
        raise TextsError(f"--text {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        byte, remedy = error.object[error.start], _remedy(path, error.object)
        raise TextsError(f"--text {path} must be UTF-8, got byte {byte:#04x} that is not; {remedy}") from None
    except csv.Error as error:
        raise TextsError(f"--text {path} is not a {kind} file: {error}.") from None


def _remedy(path: Path, begin: bytes) -> str:
    """Return what to do with a file that is not UTF-8, by how it begins."""
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif begin.startswith(COMPRESSED) or b"\0" in begin:
        return "it is no text file; write its texts as .csv or .jsonl, or unpack it"
    else:
        encoding = "latin1"
    return f"convert it: iconv -f {encoding} -t utf-8 {path} > utf8{path.suffix}"


def _gathered(rows: Iterable[str], path: Path, column: str | None, limit: int) -> Texts:
    texts: list[str] = []
    skipped, more = 0, False
    for row in rows:
        text = LONE_SURROGATE.sub("\ufffd", row.strip())
        if not text:
            skipped += 1
        elif limit and len(texts) == limit:
            more = True
            break
        else:
            texts.append(text)
    if not texts:
        where = f"column {column!r} of {path}" if column else str(path)
        raise TextsError(f"--text needs at least one text, and {where} has none.")
    return Texts(tuple(texts), column, skipped, more)


def _of_csv(file: TextIO, path: Path, column: str | None, separator: str) -> tuple[str, Iterator[str]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True)
    names = list(reader.fieldnames or ())
    other = [mark for mark in ";\t" if len(names) == 1 and column is None and mark in names[0]]
    if other:
        raise TextsError(
            f"--text {path} must have columns separated by {separator!r}, got the one column {names[0]!r}; "
            "name the file .tsv where tabs separate them, else write it anew with commas; or pass that --column."
        )
    chosen = _chosen(names, path, column)
    return chosen, (row[chosen] or "" for row in reader)


def _of_json(file: TextIO, path: Path, column: str | None) -> tuple[str, Iterator[str]]:
    records = _records(file, path)
    first = next(records, None)
    if first is None:
        raise TextsError(f"--text needs at least one text, and {path} is empty.")
    names = [name for name, value in first.items() if isinstance(value, str)]
    chosen = _chosen(list(first) if column is not None else names, path, column)
    return chosen, (_text(record, chosen, path, n) for n, record in enumerate(chain([first], records), 1))


def _records(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            remedy = "; write a list so: jq -c '.[]'" if number == 1 and line.lstrip().startswith("[") else ""
            raise TextsError(f"--text {path} must have a JSON object in each line, and line {number} is none{remedy}.")
        yield record


def _text(record: dict[str, Any], column: str, path: Path, number: int) -> str:
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        raise TextsError(
            f"column {column!r} of {path} must hold texts, got {type(value).__name__} in record {number}; "
            f"pass another --column: {', '.join(record)}."
        )
    return value or ""


def _chosen(columns: list[str], path: Path, column: str | None) -> str:
    """Return the column that was asked for, else the only one, else the only one of a usual name."""
    if not columns:
        raise TextsError(f"--text needs at least one text, and {path} has no column of texts.")
    if column is not None:
        if column in columns:
            return column
        raise TextsError(f"--column {column} is not in {path}; its columns are: {', '.join(columns)}.")
    usual = [name for name in columns if name.lower() in USUAL_NAMES]
    for names in (columns, usual):
        if len(names) == 1:
            return names[0]
    raise TextsError(
        f"--column must say which column of {path} holds the texts; its columns are: {', '.join(columns)}."
    )
