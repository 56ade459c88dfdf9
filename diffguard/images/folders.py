"""Images in a folder: one search for the command line, benchmarks and production."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PosixPath, WindowsPath

from PIL import Image

_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Formats that Pillow recognizes and cannot decode by itself, and formats of measurements."""

_SYSTEM_FOLDERS = {"__MACOSX"}
"""Folders that operating systems add to archives."""


@cache
def image_suffixes() -> frozenset[str]:
    """File name suffixes, in lower case, of the formats that the installed Pillow decodes.

    Example:
        >>> {".png", ".jpg", ".jfif", ".webp", ".tiff"} <= image_suffixes(), ".pdf" in image_suffixes()
        (True, False)
    """
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in _NO_PICTURES)


@dataclass
class Walk:
    """The images of a folder at any depth.

    Attributes:
        images: sorted.
        passed_over: number of other entries by kind: the suffix of a file, "without an ending", "that are no files"
            (pipes, broken links), "folders linked twice".
    """

    images: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def told(self) -> str:
        """A summary of `passed_over` for messages; "" if it is empty."""
        count = sum(self.passed_over.values())
        parts = ", ".join(f"{number} {kind}" for kind, number in sorted(self.passed_over.items()))
        return f"{count} passed over ({parts})" if count else ""


def walk(folder: Path) -> Walk:
    """Find the images of a folder and its subfolders, linked ones included; each folder is searched once.

    Hidden files and folders, whose name starts with a dot, are ignored.

    Args:
        folder: a local path, or a path of another file system with pathlib's methods.
    """
    result = Walk()
    if not isinstance(folder, PosixPath | WindowsPath):
        for path in folder.rglob("*"):
            if not any(is_hidden(part) for part in path.relative_to(folder).parts) and path.is_file():
                _add(path, result)
    else:
        # Links come last, so that a folder is listed under its own path and not under a link to it.
        visited, links = set[tuple[int, int]](), list[Path]()
        _walk_local(folder, visited, links, result)
        for link in links:
            _walk_local(link, visited, links, result)
    result.images.sort()
    return result


def _walk_local(folder: Path, visited: set[tuple[int, int]], links: list[Path], result: Walk) -> None:
    """Add the images of a folder unless it was visited before; linked folders in it are added to `links`."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        result.passed_over["folders linked twice"] += 1
        return
    visited.add((status.st_dev, status.st_ino))
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            continue
        if not path.is_dir():
            _add(path, result)
        elif path.is_symlink():
            links.append(path)
        else:
            _walk_local(path, visited, links, result)


def _add(path: Path, result: Walk) -> None:
    if path.suffix.lower() not in image_suffixes():
        result.passed_over[path.suffix.lower() or "without an ending"] += 1
    elif path.is_file():
        result.images.append(path)
    else:
        result.passed_over["that are no files"] += 1


def is_image(path: Path) -> bool:
    """Whether `walk` lists this file as an image."""
    return path.suffix.lower() in image_suffixes() and not is_hidden(path.name) and path.is_file()


def is_hidden(name: str) -> bool:
    """Whether `walk` ignores a file or folder of this name."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS
