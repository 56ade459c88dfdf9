"""The images in a folder: one walk for the command line, benchmarks and production."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PosixPath, WindowsPath

from PIL import Image

_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Of Pillow's formats those that it tells and does not decode itself, and measurements."""

_FOLDERS_OF_SYSTEMS = {"__MACOSX"}


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of files that are taken for images: of the formats that the installed Pillow decodes, in lower case.

    Example:
        >>> {".png", ".jpg", ".jfif", ".webp", ".tiff"} <= image_suffixes(), ".pdf" in image_suffixes()
        (True, False)
    """
    endings = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in endings.items() if kind in Image.OPEN and kind not in _NO_PICTURES)


@dataclass
class Walk:
    """The images of a folder at any depth.

    Attributes:
        images: sorted.
        passed_over: how many files of which ending are no images, "that are no files" (pipes, links that lead
            nowhere), and "folders linked twice".
    """

    images: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def told(self) -> str:
        """What was passed over, in words; "" if nothing was."""
        count = sum(self.passed_over.values())
        parts = ", ".join(f"{number} {what}" for what, number in sorted(self.passed_over.items()))
        return f"{count} passed over ({parts})" if count else ""


def walk(folder: Path) -> Walk:
    """The images of a folder, of the folders in it, and of those that are linked there; each folder once.

    What is hidden, a file or folder whose name begins with a dot, is not looked at.

    Args:
        folder: local, or a path of another file system with pathlib's methods.
    """
    found = Walk()
    if not isinstance(folder, PosixPath | WindowsPath):
        for path in folder.rglob("*"):
            if not any(is_hidden(part) for part in path.relative_to(folder).parts) and path.is_file():
                _take(path, found)
    else:
        # Folders by themselves first, so that one is known by its own place and not by a link to it.
        seen, linked = set[tuple[int, int]](), list[Path]()
        _walk_local(folder, seen, linked, found)
        for link in linked:
            _walk_local(link, seen, linked, found)
    found.images.sort()
    return found


def _walk_local(folder: Path, seen: set[tuple[int, int]], linked: list[Path], found: Walk) -> None:
    """Gather a folder, unless it was; what is linked in it comes later."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        found.passed_over["folders linked twice"] += 1
        return
    seen.add((status.st_dev, status.st_ino))
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            continue
        if not path.is_dir():
            _take(path, found)
        elif path.is_symlink():
            linked.append(path)
        else:
            _walk_local(path, seen, linked, found)


def _take(path: Path, found: Walk) -> None:
    if path.suffix.lower() not in image_suffixes():
        found.passed_over[path.suffix.lower() or "without an ending"] += 1
    elif path.is_file():
        found.images.append(path)
    else:
        found.passed_over["that are no files"] += 1


def is_image(path: Path) -> bool:
    """Whether `walk` takes a file of this name for an image."""
    return path.suffix.lower() in image_suffixes() and not is_hidden(path.name) and path.is_file()


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _FOLDERS_OF_SYSTEMS
