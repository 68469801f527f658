"""Results in files: each is written beside its place under another name, and renamed when it is whole."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["check_folder", "place", "write_csv", "write_json", "write_picture"]


def check_folder(folder: Path, *names: str) -> None:
    """Make sure, before any work, that results can be written to a folder, which may not exist yet.

    Args:
        folder: of the results.
        names: of the files.

    Raises:
        OSError: they cannot; the message says why.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.exists():
        raise NotADirectoryError(f"--output must be a folder, and {existing} is a broken link; name another folder.")
    if not existing.is_dir():
        raise NotADirectoryError(f"--output must be a folder, and {existing} is a file; name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output must be a folder to write to, and {existing} is not; name another folder.")
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"--output {folder} needs room for {name}, a folder there; name another folder.")


def place(path: Path, write: Callable[[Path], object]) -> Path:
    """Have a file written beside its place, then rename it, so that nobody finds half of it; return the path.

    Args:
        path: the file; its folder is made.
        write: writes the whole file to the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write JSON; return the path."""
    text = json.dumps(content, indent=1) + "\n"
    return place(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_csv(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records of the same fields as CSV; return the path."""

    def write(beside: Path) -> None:
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]))
            writer.writeheader()
            writer.writerows(records)

    return place(path, write)


def write_picture(path: Path, figure: Any) -> Path:
    """Write a figure of matplotlib in the format of the path's ending; return the path."""
    return place(path, figure.savefig)
