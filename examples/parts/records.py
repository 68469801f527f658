"""Rows of a file: read, and checked before any work; what is wrong is told with its line."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .task import Column, InputError, Record

__all__ = ["column_of", "load", "read"]

SHOWN = 10  # bad rows
Rows = list[tuple[str, Record]]  # where a row stands, "line 7", and its values


def read(path: Path, flatten: Callable[[Any], list[Any] | None] = lambda content: None) -> Rows:
    """Read a file of rows: .csv, .tsv, .jsonl, .json or .txt, which has a text on each line.

    Raises:
        InputError: the file is not there, is empty, or is not what its ending says.
    """
    readers = {".csv": _table, ".tsv": _table, ".jsonl": _json_lines, ".ndjson": _json_lines, ".txt": _lines}
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    suffix = path.suffix.lower()
    if suffix != ".json" and suffix not in readers:
        raise InputError(f"{path} must end in .csv, .tsv, .jsonl, .ndjson, .json or .txt, which tells how to read it.")
    try:
        rows = list(_json(path, flatten) if suffix == ".json" else readers[suffix](path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); try: iconv -f LATIN1 -t UTF-8") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path} has no rows.")
    return rows


def _table(path: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(sys.maxsize)  # 131,072 characters otherwise
    with path.open(encoding="utf-8-sig", newline="") as file:
        tabs = path.suffix.lower() == ".tsv"
        reader = csv.DictReader(file, delimiter="\t" if tabs else ",", skipinitialspace=True, strict=True)
        names = [name for name in reader.fieldnames or [] if name]
        line = reader.line_num + 1  # of a row that goes over several lines, the first
        for values in reader:
            if None in values:
                separator = "tab" if tabs else "comma"
                raise InputError(
                    f"{path}, line {line}: more fields than the header's {len(names)} ({', '.join(names)}); "
                    f"put texts that hold a {separator} in double quotes."
                )
            yield f"line {line}", values
            line = reader.line_num + 1


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        yield f"line {number}", _object(values, f"{path}, line {number}")


def _json(path: Path, flatten: Callable[[Any], list[Any] | None]) -> Iterator[tuple[str, Record]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}; a file with an object on each line ends in .jsonl.") from error
    rows = content if isinstance(content, list) else flatten(content)
    if rows is None:
        raise InputError(f"{path} must hold a list of objects, got {type(content).__name__}.")
    for number, values in enumerate(rows, 1):
        yield f"record {number}", _object(values, f"{path}, record {number}")


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"text": line.strip()}


def _object(values: Any, place: str) -> Record:
    if not isinstance(values, dict):
        raise InputError(f"{place} must be an object with named values, got {type(values).__name__}.")
    return values


def column_of(column: Column, options: argparse.Namespace) -> str:
    """Return the name that a column has in the user's file."""
    return str(getattr(options, f"{column.name}_column") or column.default)


def _columns_present(path: Path, rows: Rows, columns: Sequence[Column], options: argparse.Namespace) -> list[Column]:
    """Return the columns that the file has; InputError names the required ones that it has not."""
    found = list(dict.fromkeys(name for _, values in rows for name in values))
    # A column that is named must be there even where it could be left out.
    wanted = [c for c in columns if c.required or getattr(options, f"{c.name}_column")]
    absent = [column for column in wanted if column_of(column, options) not in found]
    if absent:
        taken = {column_of(column, options) for column in columns}
        free = [name for name in found if name not in taken]
        names = " and ".join(f'"{column_of(column, options)}"' for column in absent)
        options_shown = " ".join(
            f"--{column.name}-column {free[number] if number < len(free) else 'NAME'}"
            for number, column in enumerate(absent)
        )
        raise InputError(
            f"{path} has no column {names}; its columns are: {', '.join(map(str, found))}. "
            f"Say which to use, for example: {options_shown}"
        )
    return [column for column in columns if column_of(column, options) in found]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def load(
    path: Path,
    columns: Sequence[Column],
    options: argparse.Namespace,
    tidy: Callable[[Record, argparse.Namespace], Record] = lambda values, options: values,
    flatten: Callable[[Any], list[Any] | None] = lambda content: None,
) -> list[Record]:
    """Return the rows of a file as records with the task's own names, and "place" with the line.

    Raises:
        InputError: a column is missing, or rows are empty or wrong and --skip-bad-rows is not given.
    """
    rows = read(path, flatten)[: options.limit]
    present = _columns_present(path, rows, columns, options)
    records: list[Record] = []
    bad: list[str] = []
    for place, row in rows:
        values = {column.name: row.get(column_of(column, options)) for column in present}
        empty = [column_of(c, options) for c in present if not c.may_be_empty and _is_empty(values[c.name])]
        try:
            if empty:
                raise ValueError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty or missing")
            records.append({**tidy(values, options), "place": place})
        except ValueError as error:
            bad.append(f"{place}: {error}")
    _report_bad(path, bad, len(rows), options.skip_bad_rows)
    return records


def _report_bad(path: Path, bad: list[str], rows: int, skip: bool) -> None:
    if not bad:
        return
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    listed = "\n  ".join([*bad[:SHOWN], *more])
    if len(bad) == rows:
        raise InputError(f"{path}: none of its {rows} rows can be used:\n  {listed}")
    if not skip:
        raise InputError(
            f"{path}: {len(bad)} of {rows} rows cannot be used:\n  {listed}\n"
            "Mend them, or leave them out with --skip-bad-rows."
        )
    print(f"left out {len(bad)} of {rows} rows of {path}:\n  {listed}", file=sys.stderr)
