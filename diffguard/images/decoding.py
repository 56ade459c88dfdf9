"""Pictures from files: in any format of Pillow's, upright, and whole or refused."""

import io
import re
import struct
import zlib
from pathlib import Path

import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from diffguard.errors import DataError
from diffguard.utils.text import first_line


def read_picture(path: Path) -> Image.Image:
    """The picture of a file in any format of Pillow's, upright; of an animation the first.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the image cannot be read ({error.strerror or error})") from None
    return picture_of(content, str(path))


def picture_of(content: bytes, name: str) -> Image.Image:
    """The picture of a file's content, as `read_picture`.

    Args:
        name: what the message calls it.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    try:
        return decoded(content)
    except Exception as error:  # Pillow's readers raise whatever they meet in a damaged file
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no image format that is known here" if unknown else first_line(error)
        raise DataError(f"{name}: the image cannot be read ({reason})") from None


def decoded(content: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The picture of a file's content, upright.

    Args:
        formats: as Pillow names them; None: any.

    Raises:
        Exception: whatever Pillow's readers raise; of a PNG also where a checksum is wrong or rows are missing,
            of a JPEG where its data end too early or do not fit.
    """
    with Image.open(io.BytesIO(content), formats=formats) as file:
        if file.format == "PNG":
            file.verify()  # the checksums, which decoding does not look at; then it has to be opened again
            _check_rows(content)
        elif file.format in ("JPEG", "MPO"):  # the latter: further pictures behind the first
            _check_scans(content)
    with Image.open(io.BytesIO(content), formats=formats) as file:
        file.load()
        return upright(file)


def _check_rows(content: bytes) -> None:
    """That a PNG's chunks hold every row: Pillow leaves those that are missing black, without a word.

    Raises:
        ValueError: they do not.
    """
    width, height, depth, colour, interlaced = struct.unpack(">IIBB2xB", content[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = _ADAM7 if interlaced else [(0, 0, 1, 1)]
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    # Each row has a byte in front, which says how it is filtered.
    lacking = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    unpack, at = zlib.decompressobj(), 8
    while lacking > 0 and at + 8 <= len(content):
        [length] = struct.unpack(">I", content[at : at + 4])
        packed = content[at + 8 : at + 8 + length] if content[at + 4 : at + 8] == b"IDAT" else b""
        while packed and lacking > 0:
            lacking -= len(unpack.decompress(packed, _PIECE))
            packed = unpack.unconsumed_tail
        at += 12 + length
    # What is left over in the decompressor comes out without further input.
    while lacking > 0 and (rest := unpack.decompress(b"", _PIECE)):
        lacking -= len(rest)
    if lacking > 0:
        raise ValueError("rows of it are missing")


_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""The passes of an interlaced PNG (ISO/IEC 15948, 8.2): first column and row, and the steps between them."""

_PIECE = 2**20


def _check_scans(content: bytes) -> None:
    """That a JPEG's data are whole: Pillow drops libjpeg's warnings, and what is missing is filled with gray.

    Files of rare kinds that this decoder cannot read (chroma subsampled in an unusual way) are not checked;
    of an arithmetic-coded one the end may be missing unseen, of a progressive one whole passes, which make it finer.

    Raises:
        ValueError: they are not.
    """
    try:
        # At an eighth of the size: all of the data are read, and few pixels made of them.
        simplejpeg.decode_jpeg(content, "gray", min_height=1, min_width=1)
    except ValueError as error:
        if _DAMAGE.match(str(error)):
            raise


_DAMAGE = re.compile(
    r"Corrupt JPEG data: (?!bad ICC marker|[1-3] extraneous bytes before marker 0xd9$)|Premature end of JPEG file"
    "|Inconsistent progression"
)
"""Of libjpeg's warnings those of the pixels' data. Some cameras fill the end up to a whole word."""


def upright(image: Image.Image) -> Image.Image:
    """A picture as people see it: turned as the EXIF orientation of its file says.

    Raises:
        ValueError: its EXIF data are damaged.
    """
    try:
        turned: Image.Image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's reader raises whatever it meets
        raise ValueError(f"damaged EXIF data: {error}") from None
    return turned
