"""Requests that a server has to refuse, for its test and for experiments/serving.py."""

import base64
import contextlib
import http.client
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

JSON = {"Content-Type": "application/json"}
MAX_IMAGES, MAX_BYTES, MAX_PIXELS = 64, 16 * 2**20, 16_000_000
"""The server's limits, its defaults."""


@dataclass(frozen=True)
class Bad:
    """A request and the statuses that it may be answered with.

    Attributes:
        body: bytes, or a length that is declared without anything being sent.
        chunked: whether the body goes in chunks, without a declared length.
    """

    name: str
    body: bytes | int
    expected: tuple[int, ...]
    method: str = "POST"
    path: str = "/score"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    chunked: bool = False


def send(host: str, port: int, bad: Bad, timeout: float = 60.0) -> tuple[int, bytes]:
    """The status and body of the answer."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        if isinstance(bad.body, int):
            connection.putrequest(bad.method, bad.path)
            for name, value in {**bad.headers, "Content-Length": str(bad.body)}.items():
                connection.putheader(name, value)
            connection.endheaders()
        else:
            body = bad.body if not bad.chunked else _parts(bad.body)
            # It may have answered already, and reads on only for a while.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(bad.method, bad.path, body, bad.headers, encode_chunked=bad.chunked)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def problem(status: int, body: bytes, bad: Bad) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if status not in bad.expected:
        return f"{bad.name}: {status} {body[:200]!r}, expected {bad.expected}"
    try:
        answer = json.loads(body)
    except ValueError:
        return f"{bad.name}: {status} without JSON: {body[:200]!r}"
    detail = answer.get("detail") if isinstance(answer, dict) and set(answer) == {"detail"} else None
    if not isinstance(detail, str) or not 0 < len(detail) < 300 or "\n" in detail:
        return f"{bad.name}: {status} without one line of detail: {body[:200]!r}"
    if any(word in detail for word in ("Traceback", 'File "', "at 0x", "internal error")):
        return f"{bad.name}: {status} shows the inside: {detail!r}"
    return None


def bad_requests() -> list[Bad]:
    """More than 200, each bad in another way."""
    return [*_malformed(), *_wrong_types(), *_wrong_images(), *_too_large(), *_wrong_http()]


def text(content: bytes) -> str:
    """Base64."""
    return base64.b64encode(content).decode()


def image_file(kind: str, **options: object) -> bytes:
    """A real image file."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, rows: bytes) -> bytes:
    """A gray PNG file whose header says what one likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def cut_and_closed(content: bytes, share: float) -> bytes:
    """A JPEG of which a share of the pixels' data is left, and the end marker."""
    start = content.index(b"\xff\xda")
    return content[: start + int((len(content) - start) * share)] + b"\xff\xd9"


def zeroed(content: bytes) -> bytes:
    """A JPEG with a piece in the middle of the pixels' data overwritten."""
    start = content.index(b"\xff\xda")
    place, length = start + (len(content) - start) // 3, (len(content) - start) // 4
    return content[:place] + bytes(length) + content[place + length :]


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there over and over."""
    content = image_file("JPEG", progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]


def _parts(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 2**16):
        yield body[start : start + 2**16]


def _malformed() -> Iterator[Bad]:
    good = json.dumps({"images": [text(image_file("PNG"))]}).encode()
    bodies = [
        b"", b" ", b"{", b"}", b"[", b"nul", b"tru", b"'", b'"', b"{'images': []}", b'{"images": [}',
        b'{"images": [,]}',
        b'{"images" []}', b'{"images": ["a]}', b'{"images": ["\x01"]}', b'{"images": ["\\x"]}',
        b'{"images": ["\\ud800"]}',
        b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\x80\x81", b"\x00" * 100, b"images=1&b=2", b"<xml/>", b"{} {}",
        b"{}x", b"NaN?", b"--", b"1e", b"\x1f\x8b\x08\x00", good[:-1], good[: len(good) // 2], good + b"]", good[1:],
    ]  # fmt: skip
    for number, body in enumerate(bodies):
        yield Bad(f"malformed {number}", body, (400, 422))
    for depth in (100, 1_000, 10_000, 100_000, 1_000_000):
        yield Bad(f"arrays {depth} deep", b"[" * depth, (400, 422))
        yield Bad(f"images {depth} deep", b'{"images": ' + b"[" * depth + b"]" * depth + b"}", (400, 422))
        yield Bad(f"objects {depth} deep", b'{"a":' * depth + b"1" + b"}" * depth, (400, 422))


def _wrong_types() -> Iterator[Bad]:
    image = text(image_file("PNG"))
    values: list[object] = [
        None, True, 1, 1.5, "images", [], [[]], [image], {}, {"images": None}, {"images": 5}, {"images": image},
        {"images": {}}, {"images": {"0": image}}, {"images": []}, {"images": [None]}, {"images": [1]},
        {"images": [True]},
        {"images": [[image]]}, {"images": [{"data": image}]}, {"images": [image, None]}, {"images": [image, 3]},
        {"image": image}, {"image": [image]}, {"Images": [image]}, {"images": [image], "extra": 1},
        {"images": [image], "recontruction": True}, {"images": [image], "": 1}, {"images": [image], "k" * 10_000: 1},
        {"images": [image], "line\nbreak": 1}, {"images": [image], "reconstruction": None},
        {"images": [image], "reconstruction": 1}, {"images": [image], "reconstruction": "true"},
        {"images": [image], "reconstruction": []}, {"images": [image], "reconstruction": {}},
        {"images": [1e400]}, {"images": [10**400]}, {"images": 10**4000}, {"instances": [image]},
        {"dataframe_split": {}},
    ]  # fmt: skip
    for number, value in enumerate(values):
        yield Bad(f"wrong type {number}", json.dumps(value).encode(), (400, 422))


def _wrong_images() -> Iterator[Bad]:
    good = text(image_file("PNG"))
    wrong: dict[str, str] = {
        "empty": "",
        "blank": " ",
        "no base64": "***",
        "not ASCII": "ü" * 8,
        "a path": "/etc/passwd",
        "a URL": "https://example.org/a.png",
        "a file URL": "file:///etc/passwd",
        "URL-safe base64": base64.urlsafe_b64encode(b"\xfb\xff" * 30).decode(),
        "line breaks": base64.encodebytes(image_file("PNG")).decode(),
        "no padding": "aGVsbG8",
        "data URL without base64": "data:image/png,abc",
        "data URL without data": "data:image/png;base64,",
        "data URL of text": "data:text/plain;base64,aGVsbG8=",
        "text": text(b"hello"),
        "zeros": text(bytes(1000)),
        "noise": text(np.random.default_rng(1).bytes(1000)),
        "SVG": text(b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "PDF": text(b"%PDF-1.4\n"),
        "a script": text(b"#!/bin/sh\nexit\n"),
        "a PNG's signature": text(b"\x89PNG\r\n\x1a\n"),
        "a JPEG's signature": text(b"\xff\xd8\xff"),
        "a JPEG's start": text(b"\xff\xd8\xff\xe0" + bytes(100)),
        "no pixels": text(png(0, 0, b"")),
        "a bomb of 25 million pixels": text(png(5000, 5000, bytes(5001 * 5000))),
        "a bomb of 100 million pixels": text(png(10_000, 10_000, b"")),
        "a bomb of 3600 million pixels": text(png(60_000, 60_000, b"")),
        "a bomb of 2^62 pixels": text(png(2**31 - 1, 2**31 - 1, b"")),
        "a strip": text(png(1, 15_000_000, b"\0\0" * 1000)),
        "rows missing": text(png(100, 100, bytes(101))),
        **{kind: text(image_file(kind)) for kind in ("GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000")},
    }
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    stream = io.BytesIO()
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    wrong["animated"] = text(stream.getvalue())
    for kind, count in (("PNG", 40), ("JPEG", 40)):
        content = image_file(kind)
        for place in range(count):
            length = 3 + place * (len(content) - 20) // count
            wrong[f"{kind} cut after {length} bytes"] = text(content[:length])
    for name, content in _jpegs().items():
        for share in (0.3, 0.5, 0.7, 0.95):
            wrong[f"{name} cut to {share:.0%} and closed"] = text(cut_and_closed(content, share))
        wrong[f"{name} with zeros inside"] = text(zeroed(content))
    wrong["a JPEG in too many scans"] = text(many_scans(1000))
    content = image_file("PNG")
    for place in range(20, len(content) - 16, len(content) // 15):
        broken = bytearray(content)
        broken[place] ^= 0x10
        wrong[f"PNG with byte {place} changed"] = text(bytes(broken))
    for name, value in wrong.items():
        yield Bad(f"image: {name}", json.dumps({"images": [good, value, good]}).encode(), (422,))


def _jpegs() -> dict[str, bytes]:
    return {
        "JPEG": image_file("JPEG"),
        "progressive JPEG": image_file("JPEG", progressive=True),
        "JPEG with restart markers": image_file("JPEG", restart_marker_blocks=2),
    }


def _too_large() -> Iterator[Bad]:
    small = text(image_file("PNG"))
    for count in (MAX_IMAGES + 1, 500, 2000):
        yield Bad(f"{count} images", json.dumps({"images": [small] * count}).encode(), (413,))
    # Each is within the limit, and would be refused for its missing rows if it were decoded.
    large = text(png(4000, 4000, b""))
    for count in (11, MAX_IMAGES):
        yield Bad(f"{count} images of 16 million pixels", json.dumps({"images": [large] * count}).encode(), (413,))
    yield Bad("a million empty images", json.dumps({"images": [""] * 1_000_000}).encode(), (413,))
    for size in (MAX_BYTES + 1, 10**9, 10**15, 10**18):
        yield Bad(f"{size} bytes declared", size, (413,))
    yield Bad("too many bytes sent", b" " * (MAX_BYTES + 1), (413,))
    yield Bad("too many bytes in chunks", b" " * (MAX_BYTES + 1), (413,), chunked=True)
    yield Bad("far too many bytes in chunks", b" " * (4 * MAX_BYTES), (413,), chunked=True)


def _wrong_http() -> Iterator[Bad]:
    good = json.dumps({"images": [text(image_file("PNG"))]}).encode()
    kinds = ["", "text/plain", "text/html", "application/xml", "multipart/form-data; boundary=x", "image/png",
             "application/x-www-form-urlencoded", "application/octet-stream", "application/jsonx", "json", "text/json",
             "application/json; charset=latin-1", "application/json; charset=utf-16"]  # fmt: skip
    for kind in kinds:
        yield Bad(f"content type {kind!r}", good, (415,), headers={"Content-Type": kind} if kind else {})
    for coding in ("gzip", "deflate", "br"):
        yield Bad(f"content encoding {coding}", good, (415,), headers={**JSON, "Content-Encoding": coding})
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        yield Bad(f"{method} /score", good, (405,), method=method)
    for path in ("/health", "/version", "/docs", "/openapi.json"):
        yield Bad(f"POST {path}", good, (405,), path=path)
    for path in (
        "/",
        "/scores",
        "/score/1",
        "/invocations",
        "/ping",
        "/../etc/passwd",
        "/static-offline-docs/../x",
        "/%00",
    ):
        yield Bad(f"POST {path}", good, (404, 405), path=path)
