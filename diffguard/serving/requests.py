"""Images of a request: base64 of PNG or JPEG files, checked against limits before they are decoded.

`diffguard.serving.app` and the MLflow flavor both read their requests here, so that they refuse the same images with
the same messages. Nothing here imports torch.
"""

import base64
import binascii
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from diffguard.errors import DataError
from diffguard.images import decoded
from diffguard.serving.limits import MAX_DATA_URL_HEAD, MAX_SCANS, Limits, TooLargeError
from diffguard.utils.text import first_line

_SIGNATURES = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class _File:
    """An image file whose header is within the limits.

    Attributes:
        name: for error messages.
        kind: PNG or JPEG.
        pixels: width times height.
    """

    name: str
    content: bytes
    kind: str
    pixels: int


def decode_images(texts: Sequence[object], limits: Limits) -> Iterator[Image.Image]:
    """Decode the images of a request in order, each as the iterator reaches it, so that memory is for one at a time.

    Args:
        texts: the values of the request, of any type; valid are texts as `decode_image` takes them.

    Raises:
        TooLargeError: there are too many images, bytes, or pixels in total.
        DataError: there are no images, or one cannot be used; it is named by its index, as in ``images[3]``. What
            its header shows is raised at once, damage to its pixels when the iterator reaches it.
    """
    if not texts:
        raise DataError("images: there are none; send at least one")
    if len(texts) > limits.max_images:
        raise TooLargeError(f"images: {len(texts)} in one request; the limit is {limits.max_images}, send fewer")
    size = sum(len(text) for text in texts if isinstance(text, str))
    if size > limits.max_bytes:
        raise TooLargeError(too_many_bytes(size, limits))
    files = [_file(text, limits, f"images[{index}]") for index, text in enumerate(texts)]
    pixels = sum(file.pixels for file in files)
    if pixels > limits.max_total_pixels:
        raise TooLargeError(
            f"images: {pixels:,} pixels in total; the limit is {limits.max_total_pixels:,}, send fewer or smaller ones"
        )
    return (_picture(file, limits) for file in files)


def too_many_bytes(size: int | None, limits: Limits) -> str:
    """The message on a request with too many bytes; size None: too many, and not counted to the end."""
    count = "more than" if size is None else f"{size:,} bytes; the limit is"
    return f"the request has {count} {limits.max_bytes:,} bytes; send fewer or smaller images"


def decode_image(text: object, limits: Limits, name: str = "image") -> Image.Image:
    """Decode one image from base64 of a PNG or JPEG file, with or without the head of a data: URL.

    The format is detected from the content; EXIF orientation is applied. The image may have any of Pillow's modes;
    `diffguard.images.to_format` takes them all.

    Args:
        text: base64; any other type is an error.
        name: for the error message.

    Raises:
        DataError: the value is not text, not base64, not PNG or JPEG, damaged, truncated, animated, or exceeds the
            limits.

    Example:
        >>> decode_image("aGVsbG8=", Limits(), "images[0]")
        Traceback (most recent call last):
            ...
        diffguard.errors.DataError: images[0]: neither a PNG nor a JPEG file; convert it to one of them
    """
    return _picture(_file(text, limits, name), limits)


def encode_image(picture: Image.Image) -> str:
    """Encode an image as base64 of a PNG file.

    Example:
        >>> decode_image(encode_image(Image.new("L", (8, 8))), Limits()).size
        (8, 8)
    """
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _from_base64(text: str, name: str) -> bytes:
    start = 0
    if text[:5].lower() == "data:":
        head = _DATA_URL.match(text[:MAX_DATA_URL_HEAD])
        if head is None:
            raise DataError(f"{name}: a data: URL without ;base64,")
        start = head.end()
    try:
        content = base64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{name}: not base64 (RFC 4648: A-Z a-z 0-9 + / with = at the end, no line breaks)") from None
    if not content:
        raise DataError(f"{name}: zero bytes; send base64 of a PNG or JPEG file")
    return content


def _file(text: object, limits: Limits, name: str) -> _File:
    if not isinstance(text, str):
        raise DataError(f"{name}: {type(text).__name__} is not text; send base64 of a PNG or JPEG file")
    content = _from_base64(text, name)
    kind = next((kind for kind, signature in _SIGNATURES.items() if content.startswith(signature)), None)
    if kind is None:
        raise DataError(f"{name}: neither a PNG nor a JPEG file; convert it to one of them")
    with _errors_named(name, kind, limits), Image.open(io.BytesIO(content), formats=[kind]) as header:
        width, height = header.size
        # Phones write JPEGs with further pictures behind the first; viewers show the first, and so it is taken.
        animated = kind == "PNG" and getattr(header, "is_animated", False)
    if width * height > limits.max_pixels:
        raise DataError(f"{name}: {width}x{height} pixels; the limit is {limits.max_pixels:,} in all, make it smaller")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise DataError(
            f"{name}: {width}x{height} pixels; one side is over {limits.max_aspect:g} times the other, crop it"
        )
    if animated:
        raise DataError(f"{name}: an animated PNG; send a single picture")
    if kind == "JPEG" and (scans := _scans(content)) > MAX_SCANS:
        raise DataError(f"{name}: a JPEG in {scans} scans; the limit is {MAX_SCANS}, save it again")
    return _File(name, content, kind, width * height)


def _picture(file: _File, limits: Limits) -> Image.Image:
    with _errors_named(file.name, file.kind, limits):
        return decoded(file.content, (file.kind,))


def _scans(content: bytes) -> int:
    """Count the scans of a JPEG's first picture (ISO/IEC 10918-1, B.1); segments are skipped by their length."""
    scans, offset = 0, 2
    while (marker := _MARKER.search(content, offset)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        offset = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""Markers of a segment or of the end; not RSTn, which stand within a scan's data, and no stuffed bytes."""


@contextmanager
def _errors_named(name: str, kind: str, limits: Limits) -> Iterator[None]:
    """Turn what Pillow raises on a damaged file, which may be any exception, into a DataError that names the image."""
    try:
        yield
    except Image.DecompressionBombError:
        raise DataError(f"{name}: too many pixels; the limit is {limits.max_pixels:,}, make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: a damaged {kind} file (its header cannot be read)") from None
    except Exception as error:
        raise DataError(f"{name}: a damaged {kind} file ({first_line(error)})") from None
