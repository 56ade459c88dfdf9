"""Images that come from production: a folder of files, or a Parquet file of paths or of their contents.

They are opened one after the other; only their names are known beforehand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from diffguard.errors import DataError, SettingError
from diffguard.images import picture_of, read_picture, walk
from diffguard.utils.names import readable
from diffguard.utils.text import first_line
from tasks.common.files import is_local, place

COLUMNS = ("image", "path")
"""Of a Parquet file, where images are looked for in this order."""

ROWS = 64
"""Of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Incoming:
    """An image that is not opened yet.

    Attributes:
        name: its path, or the row of its table.
        content: of its file, or where that is; None: the table has nothing there.
    """

    name: str
    content: bytes | Path | None

    def open(self) -> Image.Image:
        """The picture.

        Raises:
            DataError: it cannot be read.
        """
        if self.content is None:
            raise DataError(f"{self.name}: empty")
        if isinstance(self.content, bytes):
            return picture_of(self.content, self.name)
        try:
            return read_picture(self.content)
        except DataError as error:
            raise DataError(readable(str(error))) from None


class Production:
    """The production images of a folder or table, in its order.

    Args:
        images: a folder, whose image files at any depth are taken; or a Parquet file. Or an fsspec URL of one.
        column: of the Parquet file: paths (relative ones from where the file is), contents of PNG or JPEG files, or
            both as Hugging Face's datasets have them; None: the first of `COLUMNS` that it has.
        limit: take no more than so many, by a random choice that stays the same; None: all.

    Raises:
        DataError: the path does not exist, or has no images.
        SettingError: the column does not exist or holds something else, or the URL's file system is unknown.
    """

    def __init__(self, images: str, column: str | None = None, limit: int | None = None) -> None:
        self._where = place(images)
        try:
            is_folder = self._where.is_dir()
            is_there = is_folder or self._where.is_file()
        except Exception as error:  # whatever the store's driver raises
            raise DataError(f"{images}: cannot be reached ({first_line(error)})") from None
        if not is_there:
            where = self._where.absolute() if is_local(self._where) else images
            raise DataError(f"{where}: no such folder of images, nor a Parquet file")
        self._files: list[Path] | None = None
        self._column = ""
        if is_folder:
            if column is not None:
                raise SettingError(f"column: {images} is a folder; a Parquet file has columns")
            inside = walk(self._where)
            self._files = inside.images
            count, none = len(self._files), inside.told or "no images in this folder"
            if count and inside.told:
                print(f"{images}: {inside.told}")
        else:
            table = self._table()
            self._column = _chosen_column(table.schema_arrow, column, images)
            count, none = int(table.metadata.num_rows), "no rows in this table"
        if not count:
            raise DataError(f"{images}: {none}")
        self._rows: NDArray[np.int64] = np.arange(count)
        if limit is not None and limit < count:
            self._rows = np.sort(np.random.default_rng(0).choice(count, limit, replace=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Incoming]:
        if self._files is None:
            yield from self._of_table()
            return
        for row in self._rows:
            path = self._files[row]
            yield Incoming(readable(path.relative_to(self._where).as_posix()), path)

    def _table(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._where.open("rb"))
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise DataError(f"{self._where}: neither a folder nor a Parquet file ({reason})") from None

    def _of_table(self) -> Iterator[Incoming]:
        wanted, first = set(self._rows.tolist()), 0
        for values in self._columns_of_table():
            for row, value in enumerate(values, first):
                if row in wanted:
                    yield self._incoming(row, value)
            first += len(values)

    def _columns_of_table(self) -> Iterator[list[Any]]:
        """The chosen column, some rows at a time."""
        batches, rows = self._table().iter_batches(batch_size=ROWS, columns=[self._column]), 0
        while True:
            try:
                values = next(batches).column(0).to_pylist()
            except StopIteration:
                return
            except (OSError, ValueError) as error:
                # A store's own errors are numbered, and may pass; what Arrow raises of damaged contents is not.
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                reason = first_line(error)
                raise DataError(f"{self._where}: damaged after row {rows} ({reason}); write it again") from None
            yield values
            rows += len(values)

    def _incoming(self, row: int, value: Any) -> Incoming:
        name = f"row {row}"
        if isinstance(value, dict):
            name = value.get("path") or name
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            url = place(value)
            is_absolute = "://" in value or url.is_absolute()
            return Incoming(value, url if is_absolute else self._where.parent / value)
        return Incoming(name, value)


def _chosen_column(schema: pa.Schema, column: str | None, images: str) -> str:
    names = schema.names
    chosen = next((name for name in COLUMNS if name in names), None) if column is None else column
    if chosen is None:
        raise SettingError(f"column: {images} has neither {' nor '.join(COLUMNS)}; name one of {', '.join(names)}")
    if chosen not in names:
        raise SettingError(f"column: {images} has no {chosen!r}; name one of {', '.join(names)}")
    kind = schema.field(chosen).type
    parts = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    fits = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not {"bytes", "path"} & set(parts) and not any(is_kind(kind) for is_kind in fits):
        raise SettingError(f"column: {chosen} of {images} is {kind}; it has to be paths, or contents of image files")
    return chosen
