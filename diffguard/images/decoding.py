"""Decoding of image files: every format of Pillow's, EXIF orientation applied, damaged files refused."""

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
    """Read an image file in any format of Pillow's, with its EXIF orientation applied; of an animation the first frame.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the image cannot be read ({error.strerror or error})") from None
    return picture_of(content, str(path))


def picture_of(content: bytes, name: str) -> Image.Image:
    """Decode the content of an image file; see `read_picture`.

    Args:
        name: for the error message.

    Raises:
        DataError: the content cannot be decoded, or is damaged.
    """
    try:
        return decoded(content)
    except Exception as error:  # Pillow raises any kind of exception on a damaged file
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a known image format" if is_unknown else first_line(error)
        raise DataError(f"{name}: the image cannot be read ({reason})") from None


def decoded(content: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode the content of an image file, with its EXIF orientation applied.

    Args:
        formats: Pillow's names of the formats to accept; None: all.

    Raises:
        Exception: of any kind, as Pillow raises them on damaged files; also if a checksum of a PNG is wrong or rows
            are missing, or if the data of a JPEG end early or are corrupt.
    """
    with Image.open(io.BytesIO(content), formats=formats) as file:
        if file.format == "PNG":
            file.verify()  # checks the checksums, which decoding ignores; the file has to be opened again after it
            _check_rows(content)
        elif file.format in ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind the first
            _check_scans(content)
    with Image.open(io.BytesIO(content), formats=formats) as file:
        file.load()
        return upright(file)


def _check_rows(content: bytes) -> None:
    """Check that a PNG's chunks hold all rows: Pillow silently leaves missing ones black.

    Raises:
        ValueError: rows are missing.
    """
    width, height, depth, colour, interlaced = struct.unpack(">IIBB2xB", content[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = _ADAM7 if interlaced else [(0, 0, 1, 1)]
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    # Each row starts with a byte for its filter.
    missing = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    decompressor, offset = zlib.decompressobj(), 8
    while missing > 0 and offset + 8 <= len(content):
        [length] = struct.unpack(">I", content[offset : offset + 4])
        is_data = content[offset + 4 : offset + 8] == b"IDAT"
        packed = content[offset + 8 : offset + 8 + length] if is_data else b""
        while packed and missing > 0:
            missing -= len(decompressor.decompress(packed, _CHUNK))
            packed = decompressor.unconsumed_tail
        offset += 12 + length
    # The decompressor may hold output back until it is asked without further input.
    while missing > 0 and (rest := decompressor.decompress(b"", _CHUNK)):
        missing -= len(rest)
    if missing > 0:
        raise ValueError("rows of it are missing")


_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""Passes of an interlaced PNG (ISO/IEC 15948, 8.2): first column, first row, and their strides."""

_CHUNK = 2**20
"""Bytes that are decompressed at once, to bound the memory."""


def _check_scans(content: bytes) -> None:
    """Check that a JPEG's data are complete: Pillow drops libjpeg's warnings and fills what is missing with gray.

    Not detected: damage to files that simplejpeg cannot decode (rare chroma subsampling), a missing end of an
    arithmetic-coded file, and missing last scans of a progressive file, which only refine it.

    Raises:
        ValueError: data are missing or corrupt.
    """
    try:
        # Decoding at an eighth of the size reads all data at little cost.
        simplejpeg.decode_jpeg(content, "gray", min_height=1, min_width=1)
    except ValueError as error:
        if _DAMAGE.match(str(error)):
            raise


_DAMAGE = re.compile(
    r"Corrupt JPEG data: (?!bad ICC marker|[1-3] extraneous bytes before marker 0xd9$)|Premature end of JPEG file"
    "|Inconsistent progression"
)
"""libjpeg's warnings about the pixels' data. Some cameras pad the end to a full word, which is harmless."""


def upright(image: Image.Image) -> Image.Image:
    """Rotate and mirror an image as the EXIF orientation of its file demands.

    Raises:
        ValueError: its EXIF data are damaged.
    """
    try:
        transposed: Image.Image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises any kind of exception here
        raise ValueError(f"damaged EXIF data: {error}") from None
    return transposed
