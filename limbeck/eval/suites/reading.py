"""Reads the files of a suite from the user's folder: Parquet, JSON Lines or CSV, as published."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...tasks.files import read_table
from ...types import LimbeckError
from .suite import Suite

FORMATS = (".parquet", ".jsonl", ".csv")


def read_rows(suite: Suite, data: Path, split: str = "test") -> list[dict[str, Any]]:
    """Return the rows of a split from the folder or file `data`, in the order of file names. The columns in
    the suite's `fields` are spelled as published, whatever their case; `_file` is the path of the row's file.

    Raises LimbeckError, with the name of the file expected and its source, if there is none, if it has no
    rows, or if a column is missing.
    """
    rows: list[dict[str, Any]] = []
    for path in find_files(suite, data, split):
        for number, row in _read(path):
            named = {str(name).lower(): value for name, value in row.items()}
            missing = [name for name in suite.fields if named.get(name.lower()) is None]
            if missing:
                raise LimbeckError(
                    f"{path}, row {number}: no field {missing[0]}, which {suite.title} has as published at "
                    f"{suite.home}; its fields here are {', '.join(map(str, row)) or 'none'}"
                )
            required = {name: named[name.lower()] for name in suite.fields}
            rows.append({**row, **required, "_file": str(path)})
    if not rows:
        raise LimbeckError(f"{data}: no rows of {suite.title}; get {suite.files[split][0]} from {suite.home}")
    return rows


def find_files(suite: Suite, data: Path, split: str = "test") -> list[Path]:
    """Return the files of a split: `data` itself if it is a file, else those below it that match the first
    of the split's patterns that matches any. A folder with the suite's name in `data` is searched alone.
    Raises LimbeckError if there are none."""
    if data.is_file() and split == "test":
        if data.suffix not in FORMATS:
            raise LimbeckError(f"{data}: {suite.title} is read from {', '.join(FORMATS)}; convert the file")
        return [data]
    folder = data if data.is_dir() else data.parent
    folder = folder / suite.name if (folder / suite.name).is_dir() else folder
    for pattern in suite.files[split] if data.exists() else ():
        found = sorted(path for path in folder.rglob(pattern) if path.suffix in FORMATS)
        if found:
            return found
    expected = " or ".join(suite.files[split])
    raise LimbeckError(f"{data}: no file {expected} of {suite.title}; it is published at {suite.home}")


def suite_files(suite: Suite, data: Path) -> list[Path]:
    """Return the files of all splits that are there. Raises LimbeckError if those of `test` are not."""
    files = find_files(suite, data)
    for split in suite.files:
        try:
            files += find_files(suite, data, split)
        except LimbeckError:
            continue
    return sorted(set(files))


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row, from 1, and the row."""
    if path.suffix != ".csv":
        yield from read_table(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.DictReader(file), start=1)
    except (UnicodeDecodeError, csv.Error) as error:
        raise LimbeckError(f"{path}: not a readable CSV file ({error}); download it again") from None
