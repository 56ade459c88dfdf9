"""Sources that are datasets of torchvision."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from diffguard.errors import DataError, SettingError
from diffguard.utils.text import first_line
from tasks.sources.image import SourceImage
from tasks.sources.settings import Torchvision


def torchvision_images(source: Torchvision) -> tuple[int, Callable[[int], SourceImage]]:
    """Return the number of images of a torchvision dataset, and a function from a row to its image."""
    dataset = torchvision_dataset(source)
    names = torchvision_classes(source)

    def at(row: int) -> SourceImage:
        # A row is read twice: its label is needed first, and another thread decodes the picture.
        label = _label_of(dataset, row)
        name = names[label] if 0 <= label < len(names) else None
        return SourceImage(
            label, name, f"torchvision {source.name} under {source.root}, image {row}", lambda: dataset[row][0]
        )

    return len(dataset), at


def _label_of(dataset: Any, row: int) -> int:
    for key in ("targets", "labels", "_labels"):
        labels = getattr(dataset, key, None)
        if labels is not None and len(labels) == len(dataset):
            return int(labels[row])
    label = dataset[row][1]
    return int(label) if isinstance(label, int | np.integer) else -1


@lru_cache(maxsize=8)
def _torchvision_of(name: str, root: str, arguments: str) -> Any:
    from torchvision import datasets

    dataset = getattr(datasets, name, None)
    if not isinstance(dataset, type):
        raise SettingError(f"source: torchvision has no dataset {name!r}; it has {', '.join(datasets.__all__)}")
    try:
        return dataset(root, **json.loads(arguments))
    except (RuntimeError, OSError, ValueError, TypeError, EOFError) as error:
        reason = first_line(error)
        raise DataError(f"torchvision {name}: it cannot be read under {root} ({reason})") from None


def torchvision_dataset(source: Torchvision) -> Any:
    return _torchvision_of(source.name, source.root, json.dumps(source.arguments, sort_keys=True))


def torchvision_classes(source: Torchvision) -> list[str]:
    """Return the class names of a torchvision dataset; empty if it has none."""
    return [str(name) for name in getattr(torchvision_dataset(source), "classes", [])]
