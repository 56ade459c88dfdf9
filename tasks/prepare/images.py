"""Images of a part of a dataset: decoded ahead, labelled, without duplicates."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diffguard.errors import DataError
from diffguard.settings import ImageFormat
from tasks.config.benchmark import Benchmark, Part
from tasks.sources.image import SourceImage
from tasks.sources.readers import read_source
from tasks.sources.settings import Drawn

AHEAD = 64
"""Images that are decoded ahead, by a few threads."""


@dataclass
class PreparedImage:
    """An image that is written under its hash, before its split and number are known."""

    label: int
    digest: str
    side: str
    origin: str
    class_name: str
    facts: dict[str, Any] = field(default_factory=dict)


def unique(
    part: Part,
    rng: np.random.Generator,
    benchmark: Benchmark,
    names: list[str] | None,
    dataset: str,
    seen: dict[str, PreparedImage],
    folder: Path,
) -> Iterator[PreparedImage]:
    """Yield the images of a part that no earlier one equals, each written to a folder under its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    position = {name: label for label, name in enumerate(names or [])}
    for source_image, png in _encoded(part, rng, benchmark.image):
        label = -1 if names is None else label_of(source_image, position, len(names), dataset)
        side = "ood" if names is None else "ind"
        image = PreparedImage(
            label, hashlib.sha256(png).hexdigest(), side, source_image.origin, source_image.class_name or ""
        )
        other = seen.get(image.digest)
        if other is not None:
            if other.side != side and not isinstance(part.source, Drawn) and benchmark.duplicates == "error":
                raise on_both_sides(benchmark, source_image.origin, other.origin)
            continue
        seen[image.digest] = image
        (folder / image.digest).write_bytes(png)
        image.facts = {
            "origin": source_image.origin,
            "source_format": source_image.format,
            "source_width": source_image.width,
            "source_height": source_image.height,
            "source_quality": source_image.quality,
            "source_bytes": source_image.bytes,
        }
        yield image


def on_both_sides(benchmark: Benchmark, origin: str, other: str) -> DataError:
    """The error of an image that is InD and OOD, by its origin and the origin of the earlier one."""
    return DataError(
        f"{origin}: the same image is InD and OOD, as {other}; remove one, or set "
        f"duplicates: drop in data/benchmarks/{benchmark.name}.yaml to leave out the later one"
    )


def _encoded(part: Part, rng: np.random.Generator, form: ImageFormat) -> Iterator[tuple[SourceImage, bytes]]:
    """The images of a source as PNG, in order; a few threads decode and encode ahead."""

    def encode(source_image: SourceImage) -> tuple[SourceImage, bytes]:
        file = io.BytesIO()
        source_image.formatted(form).save(file, "png")
        return source_image, file.getvalue()

    source = read_source(part.source, rng)
    with ThreadPoolExecutor(4) as pool:
        while batch := list(islice(source, AHEAD)):
            yield from pool.map(encode, batch)


def label_of(source_image: SourceImage, position: dict[str, int], labels: int, dataset: str) -> int:
    """Return the label of an InD image.

    Args:
        position: of each class among the benchmark's.
        labels: how many there are.
        dataset: what the message calls it.

    Raises:
        DataError: it has no label, or one that the benchmark does not have.
    """
    if source_image.class_name is not None and source_image.class_name in position:
        return position[source_image.class_name]
    if source_image.class_name is not None and source_image.label is None:
        raise DataError(f"{source_image.origin}: {source_image.class_name!r} is not one of the benchmark's classes")
    if source_image.label is None:
        raise DataError(f"{source_image.origin}: it is in no class folder, and dataset {dataset} is InD")
    if not 0 <= source_image.label < labels:
        raise DataError(
            f"{source_image.origin}: dataset {dataset}: the label {source_image.label} is not within 0..{labels - 1}"
        )
    return source_image.label
