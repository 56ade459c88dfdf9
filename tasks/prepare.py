"""Stage prepare: a benchmark's images and their manifest."""

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from diffguard.errors import DataError
from tasks.command import run_stage
from tasks.files import write_whole
from tasks.settings import ROOT, SPLITS, Benchmark, Dataset, load_benchmark, load_params
from tasks.sources import SOURCES


def prepare(benchmark: Benchmark, folder: Path, seed: int) -> pd.DataFrame:
    """Write a benchmark's images (PNG) and manifest.parquet into a folder.

    Each dataset draws from a generator of its own, and an image is used once: one that comes again,
    in any dataset, is passed over.

    Returns:
        The manifest: id, path, dataset, role, split, label (-1 for OOD), content_hash.
    """
    shutil.rmtree(folder / "images", ignore_errors=True)
    seen: set[str] = set()
    rows = []
    numbers: Counter[tuple[str, str]] = Counter()
    roles = {"ind": benchmark.ind, "near": benchmark.near, "far": benchmark.far}
    for role, datasets in roles.items():
        for name, dataset in datasets.items():
            rng = np.random.default_rng([seed, *name.encode()])
            for split, label, png in _split(name, dataset, _fresh(dataset, rng, seen), stratified=role == "ind"):
                number = numbers[name, split]
                numbers[name, split] += 1
                path = folder / "images" / name / split / f"{number:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png)
                rows.append(
                    {
                        "id": f"{name}/{split}/{number:05d}",
                        "path": str(path.relative_to(folder)),
                        "dataset": name,
                        "role": role,
                        "split": split,
                        "label": label if role == "ind" else -1,
                        "content_hash": hashlib.sha256(png).hexdigest(),
                    }
                )
    manifest = pd.DataFrame(rows)
    write_whole(folder / "manifest.parquet", lambda target: manifest.to_parquet(target, index=False))
    return manifest


def _fresh(dataset: Dataset, rng: np.random.Generator, seen: set[str]) -> Iterator[tuple[int, bytes]]:
    for label, pixels in SOURCES[dataset.source](rng, **dataset.arguments):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        png = file.getvalue()
        digest = hashlib.sha256(png).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield label, png


def _split(
    name: str, dataset: Dataset, images: Iterator[tuple[int, bytes]], *, stratified: bool
) -> Iterator[tuple[str, int, bytes]]:
    """Deal images out to the splits; stratified, each split gets its share of every label."""
    wanted = [(split, dataset.splits[split]) for split in SPLITS if split in dataset.splits]
    total = sum(count for _, count in wanted)
    taken = [image for image, _ in zip(images, range(total), strict=False)]
    if len(taken) < total:
        raise DataError(f"dataset {name}: {total} images are asked for, its source has {len(taken)} different ones")
    if stratified:
        # Sorted by label and dealt out evenly, every split sees every label in proportion.
        taken.sort(key=lambda pair: pair[0])
        position = [(k + 0.5) / count for _, count in wanted for k in range(count)]
        owner = [split for split, count in wanted for _ in range(count)]
        deal = [owner[i] for i in np.argsort(position, kind="stable")]
    else:
        deal = [split for split, count in wanted for _ in range(count)]
    for split, (label, png) in zip(deal, taken, strict=True):
        yield split, label, png


def main() -> None:
    params = load_params()
    benchmark = load_benchmark(params.benchmark)
    manifest = prepare(benchmark, ROOT / "data" / benchmark.name, params.prepare.seed)
    print(manifest.groupby(["role", "dataset", "split"], sort=False).size().to_string())


if __name__ == "__main__":
    run_stage(main)
