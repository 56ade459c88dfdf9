"""Stage prepare: a benchmark's images, brought to one format, and their manifest."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from diffguard.errors import DataError
from diffguard.utils.hashing import hash_values
from diffguard.utils.names import readable
from tasks.common.files import read_json, write_json, write_whole
from tasks.config import project
from tasks.config.benchmark import Benchmark, load_benchmark
from tasks.config.params import load_params
from tasks.config.resolve import label_names, resolved
from tasks.fetch import fetch_all
from tasks.prepare.fairness import unfair
from tasks.prepare.images import PreparedImage, unique
from tasks.prepare.splits import assign_splits
from tasks.sources.readers import listing

NOTE_FILE = "prepared.json"
"""Records what a benchmark that is not in DVC was prepared from."""


def prepare(benchmark: Benchmark, folder: Path, seed: int) -> pd.DataFrame:
    """Write a benchmark's images (PNG) and manifest.parquet into a folder.

    Each dataset draws from a generator of its own, and an image is used once: duplicates are skipped, and the
    benchmark's `duplicates` says what is done with files that are both InD and OOD.

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
    seen: dict[str, PreparedImage] = {}
    numbers: Counter[tuple[str, str]] = Counter()
    rows = []
    roles = {"ind": benchmark.ind, "near": benchmark.near, "far": benchmark.far}
    for role, datasets in roles.items():
        for name, dataset in datasets.items():
            rng = np.random.default_rng([seed, *name.encode()])
            for part in dataset.parts:
                staging = folder / "images" / name / "staging"
                images = unique(part, rng, benchmark, names if role == "ind" else None, name, seen, staging)
                for split, image in assign_splits(name, part, images):
                    number = numbers[name, split]
                    numbers[name, split] += 1
                    path = folder / "images" / name / split / f"{number:05d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    (staging / image.digest).replace(path)
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
                shutil.rmtree(staging, ignore_errors=True)
    manifest = pd.DataFrame(rows)
    check_classes(benchmark, names, set(manifest.loc[manifest["role"] == "ind", "label"]))
    write_whole(folder / "manifest.parquet", lambda target: manifest.to_parquet(target, index=False))
    return manifest


def check_classes(benchmark: Benchmark, names: list[str], present: set[int]) -> None:
    """Check that each class has images; those of a large label set, a number or weights' name, need not all have.

    Args:
        names: of the labels.
        present: the labels that InD images have.

    Raises:
        DataError: a class has none.
    """
    if not isinstance(benchmark.classes, int | str) and (lacking := set(range(len(names))) - present):
        raise DataError(
            f"data/benchmarks/{benchmark.name}.yaml: classes: the InD dataset has no images of "
            f"{names[min(lacking)]!r}; take more images, or leave the class out"
        )


def prepare_if_changed(benchmark: Benchmark, folder: Path, seed: int) -> None:
    """Prepare a benchmark, unless it was prepared from the same settings and files."""
    made_by = _made_by(benchmark, seed)
    note = folder / NOTE_FILE
    if note.is_file() and read_json(note, "")["made_by"] == made_by:
        return
    note.unlink(missing_ok=True)
    report(prepare(benchmark, folder, seed), benchmark)
    write_json(note, {"made_by": made_by})


def make_ready(benchmark: Benchmark, folder: Path, seed: int) -> None:
    """Fetch and prepare what is missing of a benchmark that is not in DVC."""
    fetch_all(benchmark.downloads, folder / "downloads")
    prepare_if_changed(benchmark, folder, seed)


def is_prepared(benchmark: Benchmark, folder: Path, seed: int) -> bool:
    """Whether `prepare_if_changed` has nothing to do."""
    note = folder / NOTE_FILE
    return note.is_file() and read_json(note, "")["made_by"] == _made_by(benchmark, seed)


def _made_by(benchmark: Benchmark, seed: int) -> str:
    sources = [part.source for dataset in (*benchmark.ind.values(), *benchmark.ood.values()) for part in dataset.parts]
    fields = {"name", "image", "classes", "ind", "near", "far", "duplicates"}
    settings = benchmark.model_dump(mode="json", include=fields)
    return hash_values([settings, seed, [listing(source) for source in sources]])


def report(manifest: pd.DataFrame, benchmark: Benchmark) -> None:
    """Print the number of images by role, dataset and split, and warnings about dataset bias."""
    print(manifest.groupby(["role", "dataset", "split"], sort=False).size().to_string())
    for warning in unfair(manifest, benchmark.image):
        print(readable(f"warning: {warning}"))


def main() -> None:
    params = load_params()
    benchmark = resolved(load_benchmark(params.benchmark), params.root)
    report(prepare(benchmark, project.ROOT / "data" / benchmark.name, params.prepare.seed), benchmark)
