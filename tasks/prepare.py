"""Stage prepare: a benchmark's images, brought to one format, and their manifest."""

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffguard.errors import DataError, SettingError
from diffguard.settings import ImageFormat
from diffguard.utils.hashing import hash_values
from diffguard.utils.names import readable
from tasks.command import run_stage
from tasks.fairness import unfair
from tasks.fetch import fetch_all
from tasks.files import read_json, write_json, write_whole
from tasks.image_sources import Drawn, Found, class_names, count, listing, place_of, read_source, resolve
from tasks.settings import ROOT, SPLITS, Benchmark, Dataset, Part, Split, load_benchmark, load_params

NOTE_FILE = "prepared.json"
"""Of what a benchmark that DVC does not have was prepared."""

AHEAD = 64
"""Images that are decoded ahead, by a few threads."""


def prepare(benchmark: Benchmark, folder: Path, seed: int) -> pd.DataFrame:
    """Write a benchmark's images (PNG) and manifest.parquet into a folder.

    Each dataset draws from a generator of its own, and an image is used once: one that comes again is passed
    over, but stored ones that are InD and OOD are the benchmark's `duplicates`.

    Args:
        benchmark: with its paths resolved; see `resolved`.

    Returns:
        The manifest: id, path, dataset, role, split, label (-1 for OOD), class_name, content_hash, origin, and
        of the file that it came from source_format, _width, _height, _quality and _bytes.

    Raises:
        DataError: a source has too few images, an image cannot be read, its class is none of the
            benchmark's, or it is both InD and OOD.
    """
    names = label_names(benchmark)
    shutil.rmtree(folder / "images", ignore_errors=True)
    seen: dict[str, _Image] = {}
    numbers: Counter[tuple[str, str]] = Counter()
    rows = []
    roles = {"ind": benchmark.ind, "near": benchmark.near, "far": benchmark.far}
    for role, datasets in roles.items():
        for name, dataset in datasets.items():
            rng = np.random.default_rng([seed, *name.encode()])
            for part in dataset.parts:
                coming = folder / "images" / name / "coming"
                images = _unique(part, rng, benchmark, names if role == "ind" else None, name, seen, coming)
                for split, image in _split(name, part, images):
                    number = numbers[name, split]
                    numbers[name, split] += 1
                    path = folder / "images" / name / split / f"{number:05d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    (coming / image.digest).replace(path)
                    rows.append(
                        {
                            "id": f"{name}/{split}/{number:05d}",
                            "path": str(path.relative_to(folder)),
                            "dataset": name,
                            "role": role,
                            "split": split,
                            "label": image.label,
                            "class_name": image.class_name if role == "ind" else "",
                            "content_hash": image.digest,
                            **image.facts,
                        }
                    )
                shutil.rmtree(coming, ignore_errors=True)
    manifest = pd.DataFrame(rows)
    check_classes(benchmark, names, set(manifest.loc[manifest["role"] == "ind", "label"]))
    write_whole(folder / "manifest.parquet", lambda target: manifest.to_parquet(target, index=False))
    return manifest


def check_classes(benchmark: Benchmark, names: list[str], present: set[int]) -> None:
    """Check that each class has images; those of a large label set, a number or weights' name, need not all have.

    Args:
        names: of the labels. present: the labels that InD images have.

    Raises:
        DataError: a class has none.
    """
    if not isinstance(benchmark.classes, int | str) and (lacking := set(range(len(names))) - present):
        raise DataError(
            f"data/benchmarks/{benchmark.name}.yaml: classes: the InD dataset has no images of "
            f"{names[min(lacking)]!r}; take more images, or leave the class out"
        )


def resolved(benchmark: Benchmark, root: str | None) -> Benchmark:
    """The benchmark with {root} and relative places in its sources replaced.

    Raises:
        SettingError: a place says {root}, and none is given.
    """

    def of(datasets: dict[str, Dataset]) -> dict[str, Dataset]:
        return {
            name: Dataset(
                parts=tuple(Part(source=resolve(p.source, root, ROOT), splits=p.splits) for p in dataset.parts)
            )
            for name, dataset in datasets.items()
        }

    return benchmark.model_copy(
        update={
            "ind": of(benchmark.ind),
            "near": of(benchmark.near),
            "far": of(benchmark.far),
            "classifiers": {name: _model_resolved(spec, root) for name, spec in benchmark.classifiers.items()},
            "denoiser": _model_resolved(benchmark.denoiser, root),
        }
    )


def _model_resolved(spec: Any, root: str | None) -> Any:
    """A model's spec with the places in it replaced; an id of a hub stays as it is."""
    places = {}
    for key in ("path", "weights"):
        text = getattr(spec, key, None)
        if text is None:
            continue
        full = ROOT / place_of(text, root)
        is_id = key == "path" and not text.startswith((".", "/", "{")) and not full.exists()
        places[key] = text if is_id else str(full)
    return spec.model_copy(update=places)


def label_names(benchmark: Benchmark) -> list[str]:
    """The names of a benchmark's labels, in their order.

    Raises:
        SettingError: they are given nowhere.
    """
    if isinstance(benchmark.classes, int):
        return [str(number) for number in range(benchmark.classes)]
    if isinstance(benchmark.classes, str):
        return _weights_classes(benchmark.classes, f"data/benchmarks/{benchmark.name}.yaml")
    if benchmark.classes is not None:
        return benchmark.classes
    [ind] = benchmark.ind.values()
    names = class_names(ind.parts[0].source)
    if not names:
        raise SettingError(f"data/benchmarks/{benchmark.name}.yaml: classes: the InD source does not name them")
    return names


def _weights_classes(name: str, where: str) -> list[str]:
    from torchvision.models import get_weight

    try:
        return [str(each) for each in get_weight(name).meta["categories"]]
    except (ValueError, KeyError, AttributeError):
        raise SettingError(
            f"{where}: classes: {name!r} is not the name of weights of torchvision, as ResNet50_Weights.IMAGENET1K_V2"
        ) from None


def prepare_if_changed(benchmark: Benchmark, folder: Path, seed: int) -> None:
    """Prepare, unless what is there was made of the same settings and files."""
    made_by = _made_by(benchmark, seed)
    note = folder / NOTE_FILE
    if note.is_file() and read_json(note, "")["made_by"] == made_by:
        return
    note.unlink(missing_ok=True)
    report(prepare(benchmark, folder, seed))
    write_json(note, {"made_by": made_by})


def make_ready(benchmark: Benchmark, folder: Path, seed: int) -> None:
    """Fetch and prepare what is not there yet, of a benchmark that DVC does not have."""
    fetch_all(benchmark.downloads, folder / "downloads")
    prepare_if_changed(benchmark, folder, seed)


def is_prepared(benchmark: Benchmark, folder: Path, seed: int) -> bool:
    """Whether `prepare_if_changed` would leave what is there."""
    note = folder / NOTE_FILE
    return note.is_file() and read_json(note, "")["made_by"] == _made_by(benchmark, seed)


def _made_by(benchmark: Benchmark, seed: int) -> str:
    sources = [part.source for each in (*benchmark.ind.values(), *benchmark.ood.values()) for part in each.parts]
    fields = {"name", "image", "classes", "ind", "near", "far", "duplicates"}
    settings = benchmark.model_dump(mode="json", include=fields)
    return hash_values([settings, seed, [listing(each) for each in sources]])


def report(manifest: pd.DataFrame) -> None:
    """Print how many images there are of what, and what is unfair about them."""
    print(manifest.groupby(["role", "dataset", "split"], sort=False).size().to_string())
    for warning in unfair(manifest):
        print(readable(f"warning: {warning}"))


@dataclass
class _Image:
    """An image that was written, by its hash, before its place was known."""

    label: int
    digest: str
    side: str
    origin: str
    class_name: str
    facts: dict[str, Any] = field(default_factory=dict)


def _unique(
    part: Part,
    rng: np.random.Generator,
    benchmark: Benchmark,
    names: list[str] | None,
    dataset: str,
    seen: dict[str, _Image],
    folder: Path,
) -> Iterator[_Image]:
    """The images of a part that are new, each written to a folder under its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    position = {name: label for label, name in enumerate(names or [])}
    for found, png in _encoded(part, rng, benchmark.image):
        label = -1 if names is None else label_of(found, position, len(names), dataset)
        side = "ood" if names is None else "ind"
        image = _Image(label, hashlib.sha256(png).hexdigest(), side, found.origin, found.class_name or "")
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


def _split(name: str, part: Part, images: Iterator[_Image]) -> Iterator[tuple[str, _Image]]:
    """Deal images out to the splits; InD ones so that each split gets its share of every label."""
    most = sum(split_numbers(name, part, count(part.source)).values())
    # The rest is of all images: which of them come twice is known once they are read.
    taken = list(islice(images, None if "rest" in part.splits.values() else most))
    numbers = split_numbers(name, part, len(taken)).items()
    # Sorted by label and dealt out evenly, every split sees every label in proportion.
    taken.sort(key=lambda image: image.label)
    position = [(k + 0.5) / number for _, number in numbers for k in range(number)]
    owner = [split for split, number in numbers for _ in range(number)]
    deal = [owner[i] for i in np.argsort(position, kind="stable")]
    yield from zip(deal, taken, strict=True)


def split_numbers(dataset: str, part: Part, images: int | None) -> dict[Split, int]:
    """How many images each split of a part gets.

    Args:
        dataset: what the message calls it.
        images: how many its source has; None: no end.

    Raises:
        SettingError: the rest of a source without end is asked for.
        DataError: it has too few.
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


def main() -> None:
    params = load_params()
    benchmark = resolved(load_benchmark(params.benchmark), params.root)
    report(prepare(benchmark, ROOT / "data" / benchmark.name, params.prepare.seed))


if __name__ == "__main__":
    run_stage(main)
