"""Assigns the images of a part to splits, in proportion to labels."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from diffguard.errors import DataError, SettingError
from tasks.config.benchmark import SPLITS, Part, Split
from tasks.prepare.images import PreparedImage
from tasks.sources.readers import count


def assign_splits(name: str, part: Part, images: Iterator[PreparedImage]) -> Iterator[tuple[str, PreparedImage]]:
    """Assign images to splits; InD ones so that every split has each label in proportion."""
    most = sum(split_numbers(name, part, count(part.source)).values())
    # "rest" needs all images: duplicates are known only once they are read.
    taken = list(islice(images, None if "rest" in part.splits.values() else most))
    numbers = split_numbers(name, part, len(taken)).items()
    # Sorted by label and spread evenly, every split sees every label in proportion.
    taken.sort(key=lambda image: image.label)
    position = [(k + 0.5) / number for _, number in numbers for k in range(number)]
    owner = [split for split, number in numbers for _ in range(number)]
    assigned = [owner[i] for i in np.argsort(position, kind="stable")]
    yield from zip(assigned, taken, strict=True)


def split_numbers(dataset: str, part: Part, images: int | None) -> dict[Split, int]:
    """Return how many images each split of a part gets.

    Args:
        dataset: what the message calls it.
        images: how many its source has; None: no end.

    Raises:
        SettingError: a split is "rest", and the source has no end.
        DataError: the source has too few images.
    """
    fixed = sum(number for number in part.splits.values() if number != "rest")
    if images is None and "rest" in part.splits.values():
        raise SettingError(f"dataset {dataset}: splits: its source has no end; give a number in place of rest")
    if images is not None and images < fixed:
        raise DataError(f"dataset {dataset}: {fixed} images are asked for, its source has {images}, each counted once")
    if images == fixed and "rest" in part.splits.values():
        raise DataError(f"dataset {dataset}: its source has {images} images, which leaves none for the rest")
    rest = 0 if images is None else images - fixed
    numbers = {split: rest if number == "rest" else number for split, number in part.splits.items()}
    return {split: numbers[split] for split in SPLITS if split in numbers}
