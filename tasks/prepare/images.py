"""The images of a part of a dataset: decoded ahead, labelled, each once."""

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
from tasks.sources.readers import Found, read_source
from tasks.sources.settings import Drawn

AHEAD = 64
"""Images that are decoded ahead, by a few threads."""


@dataclass
class SourceImage:
    """An image that was written, by its hash, before its place was known."""

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
    seen: dict[str, SourceImage],
    folder: Path,
) -> Iterator[SourceImage]:
    """The images of a part that are new, each written to a folder under its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    position = {name: label for label, name in enumerate(names or [])}
    for found, png in _encoded(part, rng, benchmark.image):
        label = -1 if names is None else label_of(found, position, len(names), dataset)
        side = "ood" if names is None else "ind"
        image = SourceImage(label, hashlib.sha256(png).hexdigest(), side, found.origin, found.class_name or "")
        other = seen.get(image.digest)
        if other is not None:
            if other.side != side and not isinstance(part.source, Drawn) and benchmark.duplicates == "error":
                raise on_both_sides(benchmark, found.origin, other.origin)
            continue
        seen[image.digest] = image
        (folder / image.digest).write_bytes(png)
        image.facts = {
            "origin": found.origin,
            "source_format": found.format,
            "source_width": found.width,
            "source_height": found.height,
            "source_quality": found.quality,
            "source_bytes": found.bytes,
        }
        yield image


def on_both_sides(benchmark: Benchmark, origin: str, other: str) -> DataError:
    """The error of an image that is InD and OOD, by where it was found and where it was before."""
    return DataError(
        f"{origin}: the same image is InD and OOD, as {other}; remove one, or set "
        f"duplicates: drop in data/benchmarks/{benchmark.name}.yaml to leave out the later one"
    )


def _encoded(part: Part, rng: np.random.Generator, form: ImageFormat) -> Iterator[tuple[Found, bytes]]:
    """The images of a source as PNG, in order, read and written by a few threads ahead of who takes them."""

    def encode(found: Found) -> tuple[Found, bytes]:
        file = io.BytesIO()
        found.formatted(form).save(file, "png")
        return found, file.getvalue()

    source = read_source(part.source, rng)
    with ThreadPoolExecutor(4) as pool:
        while some := list(islice(source, AHEAD)):
            yield from pool.map(encode, some)


def label_of(found: Found, position: dict[str, int], labels: int, dataset: str) -> int:
    """The label of an InD image.

    Args:
        position: of each class among the benchmark's. labels: how many there are.
        dataset: what the message calls it.

    Raises:
        DataError: it has none, or none of the benchmark's.
    """
    if found.class_name is not None and found.class_name in position:
        return position[found.class_name]
    if found.class_name is not None and found.label is None:
        raise DataError(f"{found.origin}: {found.class_name!r} is none of the benchmark's classes")
    if found.label is None:
        raise DataError(f"{found.origin}: it is in no class folder, and dataset {dataset} is InD")
    if not 0 <= found.label < labels:
        raise DataError(f"{found.origin}: dataset {dataset}: the label {found.label} is not within 0..{labels - 1}")
    return found.label
