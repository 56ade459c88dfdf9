"""Images of a request: what is read, and that everything else is one line that names the image."""

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from bad_requests import cut_and_closed, many_scans, zeroed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffguard.errors import DataError
from diffguard.serving.limits import Limits, TooLargeError
from diffguard.serving.requests import decode_image, decode_images, encode_image

LIMITS = Limits()
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def file(kind: str, picture: Image.Image | None = None, **options) -> bytes:
    stream = io.BytesIO()
    (picture or Image.fromarray(PIXELS)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, rows: bytes, bits: int = 8, colour: int = 0, extra: bytes = b"", interlaced: int = 0
) -> bytes:
    """A PNG file by hand, so that its header can say what Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


ADAM7_9X9 = 2 * (1 + 2) + 2 * (1 + 1) + 1 * (1 + 3) + 3 * (1 + 2) + 2 * (1 + 5) + 5 * (1 + 4) + 4 * (1 + 9)
"""Bytes of a gray 9x9 image in the seven passes of an interlaced PNG: rows times a filter byte and pixels."""

FILES = {
    "interlaced PNG": png(9, 9, bytes(ADAM7_9X9), interlaced=1),
    "large PNG": png(2000, 1500, b"\1" * (2001 * 1500)),
    "PNG": file("PNG"),
    "JPEG": file("JPEG"),
    "progressive JPEG": file("JPEG", progressive=True),
    "palette PNG": file("PNG", Image.fromarray(PIXELS).quantize(16)),
    "PNG with transparency": file("PNG", Image.fromarray(PIXELS).convert("RGBA")),
    "1-bit PNG": file("PNG", Image.fromarray(PIXELS).convert("1")),
    "16-bit PNG": png(4, 4, (b"\0" + bytes(range(8))) * 4, bits=16),
    "16-bit RGB PNG": png(4, 4, (b"\0" + bytes(range(24))) * 4, bits=16, colour=2),
    "CMYK JPEG": file("JPEG", Image.fromarray(PIXELS).convert("CMYK")),
    "gray JPEG": file("JPEG", Image.fromarray(PIXELS).convert("L")),
    "RGB JPEG": file("JPEG", keep_rgb=True),
    "JPEG with restart markers": file("JPEG", restart_marker_blocks=2),
    "JPEG of one pixel": file("JPEG", Image.new("RGB", (1, 1))),
}


@pytest.mark.parametrize("name", FILES)
def test_real_files_are_read(name):
    decoded = decode_image(text(FILES[name]), LIMITS)
    with Image.open(io.BytesIO(FILES[name])) as expected:
        assert decoded.mode == expected.mode
        assert np.array_equal(np.asarray(decoded), np.asarray(expected))


ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19i"
    "Z2hnPk1xeXBkeFxlZ2P/yQALCAAIAAgBAREA/8wABgAQEAX/2gAIAQEAAD8A/q65Hl0KuMf/2Q=="
)


def with_segment(marker: int, content: bytes) -> bytes:
    """The JPEG with an application's segment in front."""
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    return FILES["JPEG"][:2] + segment + FILES["JPEG"][2:]


ODD_JPEGS = {
    "arithmetic coding": ARITHMETIC,
    "two pictures": file("MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]),
    "something behind the end": FILES["JPEG"] + b"\xff\xda more" * 100,
    "a thumbnail of many scans": with_segment(0xE1, b"Exif\0\0" + many_scans(40)[:60_000]),
    "an unknown version of JFIF": FILES["JPEG"].replace(b"JFIF\0\1", b"JFIF\0\2"),
    "a bad ICC profile": with_segment(0xE2, b"ICC_PROFILE\0\5\2abc"),
    "an unknown colour transform": FILES["CMYK JPEG"].replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\7"),
    "an end that is filled to a word": FILES["JPEG"][:-2] + bytes(4) + FILES["JPEG"][-2:],
}


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_a_jpeg_that_is_odd_but_whole_is_read(name):
    with Image.open(io.BytesIO(ODD_JPEGS[name])) as expected:
        assert np.array_equal(np.asarray(decode_image(text(ODD_JPEGS[name]), LIMITS)), np.asarray(expected))


@pytest.mark.parametrize("name", [name for name in FILES if "JPEG" in name and "one pixel" not in name])
def test_a_jpeg_without_a_part_of_its_data_is_an_error(name):
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(DataError, match="image: a damaged JPEG file"):
            decode_image(text(cut_and_closed(FILES[name], share)), LIMITS)
    with pytest.raises(DataError, match="a damaged JPEG file"):
        decode_image(text(zeroed(FILES[name])), LIMITS)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:;base64,", "DATA:image/jpeg;charset=x;base64,"])
def test_a_data_url_is_read_and_content_tells_the_format(head):
    assert np.array_equal(np.asarray(decode_image(head + text(FILES["PNG"]), LIMITS)), PIXELS)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = decode_image(text(file("JPEG", exif=exif)), LIMITS)
    assert upright.size == (24, 40)
    plain = decode_image(text(file("JPEG")), LIMITS)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(plain), -1))


def animated() -> bytes:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    return file("PNG", frames[0], save_all=True, append_images=frames[1:])


def flipped(content: bytes) -> bytes:
    """One bit of a PNG's pixels changed, its checksum not."""
    place = content.index(b"IDAT") + 60
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


BAD = {
    "no text": (17, "int is not text"),
    "null": (None, "NoneType is not text"),
    "empty": ("", "zero bytes"),
    "no base64": ("***", "not base64"),
    "not ASCII": ("Zäh=", "not base64"),
    "line breaks": (text(FILES["PNG"])[:76] + "\n" + text(FILES["PNG"])[76:], "not base64"),
    "no padding": ("aGVsbG8", "not base64"),
    "a URL": ("https://example.org/image.png", "not base64"),
    "a data URL without base64": ("data:image/png,abc", "without ;base64,"),
    "an empty data URL": ("data:image/png;base64,", "zero bytes"),
    "plain text": (text(b"hello"), "neither a PNG nor a JPEG"),
    "GIF": (text(file("GIF")), "neither a PNG nor a JPEG"),
    "WebP": (text(file("WEBP")), "neither a PNG nor a JPEG"),
    "TIFF": (text(file("TIFF")), "neither a PNG nor a JPEG"),
    "a PNG's signature alone": (text(FILES["PNG"][:8]), "a damaged PNG"),
    "a JPEG's signature alone": (text(FILES["JPEG"][:3]), "a damaged JPEG"),
    "half a PNG": (text(FILES["PNG"][: len(FILES["PNG"]) // 2]), "a damaged PNG"),
    "half a JPEG": (text(FILES["JPEG"][: len(FILES["JPEG"]) // 2]), "a damaged JPEG"),
    "a PNG without its end": (text(FILES["PNG"][:-12]), "a damaged PNG"),
    "a flipped bit": (text(flipped(FILES["PNG"])), "a damaged PNG"),
    "a PNG without its last row": (text(png(100, 100, bytes(101 * 99))), "a damaged PNG"),
    "a PNG without its last pixel": (text(png(100, 100, bytes(101 * 100 - 1))), "a damaged PNG"),
    "an interlaced PNG without its last pixel": (text(png(9, 9, bytes(ADAM7_9X9 - 1), interlaced=1)), "a damaged PNG"),
    "a JPEG in many scans": (text(many_scans(40)), "a JPEG in 50 scans; the limit is 32, save it again"),
    "animated": (text(animated()), "an animated PNG"),
    "no pixels": (text(png(0, 0, b"")), "a damaged PNG"),
    "a bomb": (text(png(5000, 5000, b"")), "5000x5000 pixels; the limit is 16,000,000 in all"),
    "a bomb that Pillow refuses": (text(png(60000, 60000, b"")), "too many pixels; the limit is 16,000,000"),
    "a strip": (text(png(1, 9000, b"\0\0" * 9000)), "one side is over 100 times the other"),
    "a bomb of text": (
        text(png(4, 4, b"\0\0\0\0\0" * 4, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))))),
        "a damaged PNG",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_one_line_that_names_it(name):
    given_text, words = BAD[name]
    with pytest.raises(DataError) as raised:
        list(decode_images([text(FILES["PNG"]), given_text], LIMITS))
    message = str(raised.value)
    assert message.startswith("images[1]: ")
    assert words in message
    assert "\n" not in message
    assert "object at 0x" not in message
    assert not isinstance(raised.value, TooLargeError)


def test_a_bomb_costs_nothing():
    bomb = text(png(5000, 5000, bytes(5001 * 5000)))
    assert len(bomb) < 50_000
    tracemalloc.start()
    with pytest.raises(DataError, match="5000x5000"):
        decode_image(bomb, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_pixels_up_to_the_limit_are_read():
    rows = bytes(101 * 100)
    assert decode_image(text(png(100, 100, rows)), Limits(max_pixels=10_000)).size == (100, 100)
    with pytest.raises(DataError, match="100x100 pixels"):
        decode_image(text(png(100, 100, rows)), Limits(max_pixels=9_999))


def test_too_many_images_or_bytes():
    image = text(FILES["PNG"])
    assert len(list(decode_images([image] * 3, Limits(max_images=3)))) == 3
    with pytest.raises(TooLargeError, match="4 in one request; the limit is 3"):
        decode_images([image] * 4, Limits(max_images=3))
    with pytest.raises(TooLargeError, match="the limit is 5,000 bytes"):
        decode_images([image] * 2, Limits(max_bytes=5_000))
    with pytest.raises(DataError, match="there are none"):
        decode_images([], LIMITS)


def test_pixels_of_all_images_are_limited_before_any_is_decoded():
    image = text(png(100, 100, b""))
    with pytest.raises(TooLargeError, match="images: 30,000 pixels in total; the limit is 29,999, send fewer"):
        decode_images([image] * 3, Limits(max_total_pixels=29_999))
    decode_images([image] * 3, Limits(max_total_pixels=30_000))


def test_what_a_header_shows_is_told_at_once():
    with pytest.raises(DataError, match=r"images\[1\]: not base64"):
        decode_images([text(FILES["PNG"]), "***"], LIMITS)


def test_images_are_decoded_one_at_a_time():
    images = decode_images([text(FILES["PNG"]), text(png(100, 100, b""))], LIMITS)
    assert next(images).size == (40, 24)
    with pytest.raises(DataError, match=r"images\[1\]"):
        next(images)


def test_encoding_is_undone_by_decoding():
    assert np.array_equal(np.asarray(decode_image(encode_image(Image.fromarray(PIXELS)), LIMITS)), PIXELS)


def image_or_error(value: object) -> None:
    try:
        made: Image.Image | str = decode_image(value, Limits(max_pixels=100_000))
    except DataError as error:
        made = str(error)
    assert isinstance(made, Image.Image) or (made.startswith("image: ") and "\n" not in made)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary().map(text), st.none(), st.integers(), st.lists(st.text())))
def test_anything_is_an_image_or_an_error(value):
    image_or_error(value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6), st.binary(max_size=40))
def test_a_file_that_is_cut_is_an_error(name, length, tail):
    content = FILES[name]
    image_or_error(text(content[: length % len(content)] + tail))
    # A PNG's last chunk says only that it is the last; without a part of it nothing is lost.
    whole = len(content) - (11 if "PNG" in name else 0)
    with pytest.raises(DataError):
        decode_image(text(content[: length % whole]), LIMITS)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6))
def test_a_damaged_file_is_an_image_or_an_error(name, changes):
    content = bytearray(FILES[name])
    for place, value in changes:
        content[place % len(content)] = value
    image_or_error(text(bytes(content)))


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.binary(max_size=120))
def test_a_strange_exif_is_an_image_or_an_error(start, more):
    exif = b"Exif\0\0" + (b"MM\0*\0\0\0\x08" if start[0] % 2 else b"") + start + more
    content = FILES["JPEG"]
    image_or_error(text(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"gAMA"]),
    st.binary(max_size=60),
)
def test_a_strange_chunk_is_an_image_or_an_error(kind, content):
    for bits, colour, row in ((8, 0, 1), (16, 0, 2), (8, 2, 3), (16, 2, 6), (8, 3, 1), (16, 6, 8)):
        rows = (b"\0" + bytes(4 * row)) * 4
        image_or_error(text(png(4, 4, rows, bits=bits, colour=colour, extra=chunk(kind, content))))
