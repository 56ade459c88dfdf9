"""Image files on the command line: folders are gone through, pictures are read one after the other."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffguard.errors import DataError
from diffguard.images import walk

if TYPE_CHECKING:
    from torch import Tensor

    from diffguard.deploy.detector import DeployedDetector

BATCH = 64
"""Images that are in memory at a time."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and the images of folders at any depth, sorted; each once.

    Raises:
        DataError: a path is not there, or a folder has no images.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = walk(path)
            told = f"{path}: {inside.told}" if inside.told else ""
            if not inside.images:
                raise DataError(told or f"{path}: no images in this folder")
            if told:
                print(told, file=sys.stderr)
            found |= dict.fromkeys(inside.images)
        elif path.exists():
            found[path] = None
        else:
            raise DataError(f"{path}: no such file or folder")
    return list(found)


def batches(paths: Sequence[Path], detector: "DeployedDetector") -> Iterator[list[tuple[Path, "Tensor | DataError"]]]:
    """Prepared images [C, H, W] of files, or why there is none, so many at a time."""
    from diffguard.images import read_picture

    for start in range(0, len(paths), BATCH):
        batch: list[tuple[Path, Tensor | DataError]] = []
        for path in paths[start : start + BATCH]:
            try:
                batch.append((path, detector.prepare(read_picture(path), str(path))))
            except DataError as error:
                batch.append((path, error))
        yield batch
