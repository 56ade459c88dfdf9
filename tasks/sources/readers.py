"""Reads the images of a source of any kind: in random order for a dataset, or listed without decoding them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffguard.errors import DataError
from diffguard.images import walk
from diffguard.utils.names import readable
from tasks.sources.files import folder_files, list_lines, sorted_names
from tasks.sources.huggingface import huggingface_classes, huggingface_images
from tasks.sources.image import SourceImage
from tasks.sources.settings import Digits, Drawn, Folder, HuggingFace, ImageList, Letters, Torchvision
from tasks.sources.synthetic import SOURCES
from tasks.sources.torchvision import torchvision_classes, torchvision_images


def read_source(source: Any, rng: np.random.Generator) -> Iterator[SourceImage]:
    """Yield the images of a source in random order; some drawn sources have no end.

    Raises:
        DataError: its files are missing or malformed.
    """
    if isinstance(source, Drawn):
        arguments = source.model_dump(exclude={"kind"})
        for number, (label, pixels) in enumerate(SOURCES[source.kind](rng, **arguments)):
            picture = Image.fromarray(pixels)
            yield SourceImage(label, None, f"{source.kind} {number}", lambda picture=picture: picture)
        return
    size, image_at = _opened(source)
    for row in rng.permutation(size):
        yield image_at(int(row))


def listed(source: Any) -> Iterator[SourceImage]:
    """Yield all images of a source of files in its own order, without reading them.

    Raises:
        DataError: its files are missing or malformed.
    """
    listing(source)  # raises if a file that an image list names is missing
    size, image_at = _opened(source)
    return map(image_at, range(size))


def count(source: Any) -> int | None:
    """Return the number of images of a source; None if it has no end.

    Raises:
        DataError: its files are missing or malformed.
    """
    if isinstance(source, Digits):
        return sum(1 for _ in SOURCES["digits"](np.random.default_rng(0), classes=source.classes))
    return None if isinstance(source, Drawn) else _opened(source)[0]


def class_names(source: Any) -> list[str]:
    """Return the class names of a source in the order of its labels; empty if it names none."""
    if isinstance(source, Folder):
        return source.classes or sorted_names(source)
    if isinstance(source, Letters):
        return list(source.characters)
    if isinstance(source, Torchvision):
        return torchvision_classes(source)
    if isinstance(source, HuggingFace):
        return huggingface_classes(source)
    return []


def listing(source: Any) -> list[Any]:
    """Return path, size and modification time of each file of a source, which tell whether it has changed.

    Raises:
        DataError: a file is missing or malformed.
    """
    if isinstance(source, Folder):
        paths = [path for path, _ in folder_files(source)]
    elif isinstance(source, ImageList):
        listed_paths = [path for path, _ in list_lines(source)]
        if missing := [path for path in listed_paths if not path.is_file()]:
            more = f", nor are {len(missing) - 1} more of its {len(listed_paths)} images" if len(missing) > 1 else ""
            raise DataError(
                f"{source.path}: it names {missing[0]}, which is not there{more}; bring it, or mend the list"
            )
        paths = [Path(source.path), *listed_paths]
    elif isinstance(source, Torchvision | HuggingFace):
        folder = Path(source.root if isinstance(source, Torchvision) else source.path)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        paths = []
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _opened(source: Any) -> tuple[int, Callable[[int], SourceImage]]:
    """Return the number of images of a source of files, and a function from a row to its image."""
    if isinstance(source, Folder):
        files = folder_files(source)

        def of_folder(row: int) -> SourceImage:
            path, name = files[row]
            return SourceImage(None, name, readable(path), lambda: path)

        return len(files), of_folder
    if isinstance(source, ImageList):
        lines = list_lines(source)

        def of_list(row: int) -> SourceImage:
            path, label = lines[row]
            return SourceImage(label, None, readable(path), lambda: path)

        return len(lines), of_list
    return torchvision_images(source) if isinstance(source, Torchvision) else huggingface_images(source)


def passed_over(source: Any) -> str:
    """Describe the files of a source that are not images; "" if there are none."""
    return walk(Path(source.path)).told if isinstance(source, Folder) else ""
