"""Decisions as rows of a Parquet, CSV or JSON file, written one by one; the file appears atomically at the end."""

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from diffguard.errors import DataError
from diffguard.utils.names import readable

if TYPE_CHECKING:
    from diffguard.deploy.detector import Decision

COLUMNS = {
    "path": "string",
    "label": "int64",
    "class_name": "string",
    "confidence": "float64",
    "score": "float64",
    "p_value": "float64",
    "is_ood": "bool",
    "diffused": "bool",
    "error": "string",
}
"""Columns with their Arrow types. A row of an unreadable image has only path and error; in others error is null."""

Row = dict[str, Any]
ROW_GROUP = 4096
"""Rows of a Parquet row group, which are in memory at once."""


def row_of(path: Path, decision: "Decision | None" = None, error: str | None = None) -> Row:
    """Make a row from a decision or from an error."""
    values = {key: getattr(decision, key, None) for key in COLUMNS}
    return {**values, "path": readable(path), "error": None if error is None else readable(error)}


def output_path(text: str) -> Path:
    """Parse the path of a file that `open_writer` can write, for argparse."""
    path = Path(text)
    if path.suffix not in _WRITERS:
        raise argparse.ArgumentTypeError(f"{text}: neither {', '.join(list(_WRITERS)[:-1])} nor {list(_WRITERS)[-1]}")
    return path


@contextmanager
def open_writer(path: Path | None) -> Iterator[Callable[[Row], None]]:
    """Open a file and yield the function that writes a row; at the end the file is renamed to its path.

    Args:
        path: its suffix selects the format; None: rows are discarded.

    Raises:
        DataError: the file cannot be written.
    """
    if path is None:
        yield lambda row: None
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with _WRITERS[path.suffix](partial) as write:
                yield write
            os.replace(partial, path)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[Row], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, kind.replace("bool", "bool_"))()) for name, kind in COLUMNS.items()])
    rows: list[Row] = []
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        def write(row: Row) -> None:
            rows.append(row)
            if len(rows) >= ROW_GROUP:
                flush()

        yield write
        flush()


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        yield writer.writerow


@contextmanager
def _json(path: Path) -> Iterator[Callable[[Row], None]]:
    """Write one array with one object per line."""
    with path.open("w", encoding="utf-8") as file:
        yield _JsonArray(file).write
        file.write("]\n" if file.tell() else "[]\n")


class _JsonArray:
    def __init__(self, file: TextIO) -> None:
        self._file, self._separator = file, "[\n"

    def write(self, row: Row) -> None:
        self._file.write(self._separator + json.dumps(row))
        self._separator = ",\n"


_WRITERS = {".parquet": _parquet, ".csv": _csv, ".json": _json}
