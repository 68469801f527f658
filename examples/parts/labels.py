"""Labels: strings or whole numbers in the data, numbers for the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .task import InputError, Record

__all__ = ["label_name", "names_of", "shown"]

SHOWN, LONGEST_SHOWN = 12, 30  # names, and letters of one
FEWEST_SUSPECT = 20  # classes; more than half as many classes as rows, and the column is likely a wrong one


def label_name(value: Any) -> str:
    """Return a label's name: a string as it is, a whole number as its digits.

    Raises:
        ValueError: it is a number with a fraction, or no single value.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"label {value} is a number with a fraction; labels are names or whole numbers")
        value = int(value)
    if not isinstance(value, (str, int)):
        raise ValueError(f"label {str(value)[:60]!r} is neither a name nor a whole number")
    return str(value).strip()


def shown(names: list[str]) -> str:
    """Return names for a message, cut after a few."""
    short = [name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..." for name in names[:SHOWN]]
    return ", ".join(short) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _sorted(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def names_of(
    records: list[Record],
    validation: list[Record],
    labels_of: Callable[[Record], list[str]],
    data: Path | None,
    validation_file: Path | None,
) -> list[str]:
    """Return the labels in order: numbers by their size, names by the alphabet.

    Raises:
        InputError: there is only one; nearly every row has its own; or the validation file has one that the data lacks.
    """
    known = {name for record in records for name in labels_of(record)}
    if validation_file is None:
        known |= {name for record in validation for name in labels_of(record)}
    else:
        for record in validation:
            if unknown := [name for name in labels_of(record) if name not in known]:
                raise InputError(
                    f"{validation_file}, {record['place']} has the label {unknown[0]!r}, which {data} has not; "
                    f"its labels are: {shown(_sorted(known))}."
                )
    if len(known) < 2:
        raise InputError(
            f"{data}: every label is {next(iter(known), 'missing')!r}; there must be two or more to learn."
        )
    rows = len(records) + len(validation)
    if len(known) > FEWEST_SUSPECT and 2 * len(known) > rows:
        raise InputError(
            f"{data}: {rows} rows have {len(known)} different labels ({shown(_sorted(known))}); "
            "name the column that holds the classes."
        )
    return _sorted(known)
