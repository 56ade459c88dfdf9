"""Image files on the command line: folders are searched, images are read in batches."""

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
"""Images in memory at once."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files that paths name, in their order and each once; of a folder its images at any depth, sorted.

    Raises:
        DataError: a path does not exist, or a folder has no images.
    """
    images: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            contents = walk(path)
            passed_over = f"{path}: {contents.told}" if contents.told else ""
            if not contents.images:
                raise DataError(passed_over or f"{path}: no images in this folder")
            if passed_over:
                print(passed_over, file=sys.stderr)
            images |= dict.fromkeys(contents.images)
        elif path.exists():
            images[path] = None
        else:
            raise DataError(f"{path}: no such file or folder")
    return list(images)


def batches(paths: Sequence[Path], detector: "DeployedDetector") -> Iterator[list[tuple[Path, "Tensor | DataError"]]]:
    """Read files in batches of `BATCH`: each file with its prepared image [C, H, W], or with the error that it gave."""
    from diffguard.images import read_picture

    for start in range(0, len(paths), BATCH):
        batch: list[tuple[Path, Tensor | DataError]] = []
        for path in paths[start : start + BATCH]:
            try:
                batch.append((path, detector.prepare(read_picture(path), str(path))))
            except DataError as error:
                batch.append((path, error))
        yield batch
