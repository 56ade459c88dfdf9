"""Sources that are datasets of Hugging Face, from their hub or from a folder."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffguard.errors import DataError
from diffguard.utils.text import first_line
from tasks.sources.image import SourceImage
from tasks.sources.settings import HuggingFace


def huggingface_images(source: HuggingFace) -> tuple[int, Callable[[int], SourceImage]]:
    """Return the number of rows of a Hugging Face dataset, and a function from a row to its image."""
    import datasets

    rows = _dataset(source)
    kind = rows.features[source.image]
    if isinstance(kind, datasets.Image):
        # As files: their format stays known, and other threads decode them.
        rows = rows.cast_column(source.image, datasets.Image(decode=False))
    names = huggingface_classes(source)
    # The label column by itself, so that no image is read.
    labels = rows[source.label][:] if source.label is not None else [None] * len(rows)

    def at(row: int) -> SourceImage:
        label = labels[row]
        name = names[label] if names and label is not None and 0 <= label < len(names) else None
        if isinstance(label, str):
            label, name = None, label

        def content() -> bytes | Path:
            value = rows[row][source.image]
            if isinstance(value, dict):
                value = value["bytes"] if value.get("bytes") is not None else Path(value["path"])
            if not isinstance(value, bytes | Path):
                raise DataError(f"{origin}: column {source.image} holds no image")
            return value

        origin = f"{source.path}, split {source.split}, row {row}"
        return SourceImage(label, name, origin, content)

    return len(rows), at


@lru_cache(maxsize=8)
def _load(path: str, split: str, arguments: str) -> Any:
    import datasets

    folder = Path(path)
    try:
        if folder.is_dir() and any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise DataError(f"{path}: it has no split {split!r}; it has {', '.join(saved)}")
                return saved[split]
            return saved
        return datasets.load_dataset(path, split=split, **json.loads(arguments))
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers do
        reason = first_line(error)
        raise DataError(
            f"dataset {path}: it cannot be read ({reason}); without network, give a folder of its files as path"
        ) from None


def _dataset(source: HuggingFace) -> Any:
    rows = _load(source.path, source.split, json.dumps(source.arguments, sort_keys=True))
    for key in ("image", "label"):
        column = getattr(source, key)
        if column is not None and column not in rows.features:
            raise DataError(
                f"dataset {source.path}: it has no column {column!r} ({key}); it has {', '.join(rows.features)}"
            )
    return rows


def huggingface_classes(source: HuggingFace) -> list[str]:
    """Return the class names of the label column; empty if it has none."""
    return list(getattr(_dataset(source).features.get(source.label), "names", []))
