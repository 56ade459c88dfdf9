"""Checks a benchmark's images; if they are not prepared yet, reads a sample of each source."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from tasks.config.benchmark import Benchmark, Dataset, Part, Split
from tasks.config.resolve import label_names
from tasks.config.run import Run
from tasks.doctor.report import Report
from tasks.fetch import is_fetched
from tasks.prepare.fairness import dataset_warnings
from tasks.prepare.images import label_of, on_both_sides
from tasks.prepare.splits import split_numbers
from tasks.prepare.stage import check_classes, is_prepared
from tasks.sources.readers import count, listed, passed_over, read_source
from tasks.sources.settings import Drawn

SAMPLED = 64
"""Images of each source that are read, where they are not prepared yet."""

MOST_CLASSES = 10
"""Classes whose images are counted one by one."""


def check_images(report: Report, run: Run) -> pd.DataFrame | None:
    """Return the manifest, or, if not prepared yet, one of a few images of each dataset; None on errors."""
    benchmark = run.benchmark
    with report.check("images") as ok:
        if run.recorded_seeds is None:
            ready = is_prepared(benchmark, run.home, run.params.prepare.seed)
        else:
            ready = run.manifest_file.is_file()
        names = run.classes if ready else label_names(benchmark)
        ok(f"{len(names)} classes: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}")
        missing = [
            name
            for name, download in benchmark.downloads.items()
            if not is_fetched(name, download, run.home / "downloads")
        ]
        if missing:
            command = f"python -m tasks.fetch --benchmark {benchmark.name}"
            ok(f"{', '.join(missing)}: not fetched yet; the run does it, or {command}")
            return None
        if ready:
            manifest = run.manifest
            for (role, dataset), rows in manifest.groupby(["role", "dataset"], sort=False):
                splits = ", ".join(f"{split} {number}" for split, number in rows["split"].value_counts().items())
                ok(f"{role} {dataset}: {splits}")
                if role == "ind":
                    ok(f"ind: {_of_each_class(rows['label'], names)}")
        else:
            sample = _sampled_manifest(report, run, names)
            if sample is None:
                return None
            manifest = sample
        for warning in dataset_warnings(run, manifest):
            report.line("warn", "fairness", warning)
        return manifest
    return None


def _sampled_manifest(report: Report, run: Run, names: list[str]) -> pd.DataFrame | None:
    """Check all labels and return a manifest of a sample of each part; None if anything is wrong."""
    benchmark, before = run.benchmark, report.problems
    roles: dict[str, dict[str, Dataset]] = {"ind": benchmark.ind, "near": benchmark.near, "far": benchmark.far}
    rows: list[dict[str, Any]] = []
    labels: list[int] = []
    seen: dict[bytes, dict[str, Any]] = {}
    for role, datasets in roles.items():
        for name, dataset in datasets.items():
            for part in dataset.parts:
                with report.check("images") as ok:
                    labels += _labels(part, names, name) if role == "ind" else []
                    total = sum(split_numbers(name, part, count(part.source)).values())
                    sample = _sampled_rows(run, names, role, name, part)
                    _check_sides(benchmark, sample, seen)
                    rows += sample
                    if skipped := passed_over(part.source):
                        report.line("warn", "images", f"{role} {name}: {skipped}")
                    ok(f"{role} {name}: {total} images, of which {min(SAMPLED, total)} were read; not prepared yet")
    if labels and report.problems == before:
        with report.check("images") as ok:
            check_classes(benchmark, names, set(labels))
            ok(f"ind: {_of_each_class(labels, names)}")
    return pd.DataFrame(rows) if report.problems == before else None


def _sampled_rows(run: Run, names: list[str], role: str, dataset: str, part: Part) -> list[dict[str, Any]]:
    form = run.benchmark.image
    position = {name: label for label, name in enumerate(names)}
    return [
        {
            "role": role,
            "label": label_of(image, position, len(names), dataset) if role == "ind" else -1,
            "dataset": dataset,
            "split": "",
            "drawn": isinstance(part.source, Drawn),
            "origin": image.origin,
            "image": image.formatted(form),
            "source_format": image.format,
            "source_width": image.width,
            "source_height": image.height,
            "source_quality": image.quality,
            "source_bytes": image.bytes,
        }
        for image in islice(read_source(part.source, np.random.default_rng(0)), SAMPLED)
    ]


def _check_sides(benchmark: Benchmark, rows: list[dict[str, Any]], seen: dict[bytes, dict[str, Any]]) -> None:
    """Raise a DataError if an image is InD and OOD, where that stops the run; seen: the rows before, by pixels."""
    for row in rows:
        other = seen.setdefault(row["image"].tobytes(), row)
        sides_differ = (other["role"] == "ind") != (row["role"] == "ind")
        if sides_differ and not row["drawn"] and benchmark.duplicates == "error":
            raise on_both_sides(benchmark, row["origin"], other["origin"])


def _labels(part: Part, names: list[str], dataset: str) -> list[int]:
    """Return the labels of all InD images of a part, without reading them; none of a drawn source."""
    if isinstance(part.source, Drawn):
        return []
    position = {name: label for label, name in enumerate(names)}
    return [label_of(image, position, len(names), dataset) for image in listed(part.source)]


def _of_each_class(labels: Iterable[int], names: list[str]) -> str:
    """How many images each class has, or of many classes the fewest and the most."""
    counts = Counter(labels)
    if len(counts) <= MOST_CLASSES:
        return ", ".join(f"{names[label]} {images}" for label, images in sorted(counts.items()))
    (most, highest), (fewest, lowest) = counts.most_common()[0], counts.most_common()[-1]
    return f"{len(counts)} classes, of {lowest} images ({names[fewest]}) to {highest} ({names[most]})"


def image_count(run: Run, splits: set[Split]) -> int:
    """Count the images of these splits, at most `limit` of each dataset of validation and test."""
    if run.manifest_file.is_file():
        numbers = run.manifest.groupby(["dataset", "split"]).size()
        sizes = [(split, int(number)) for (_, split), number in numbers.items()]
    else:
        datasets = {**run.benchmark.ind, **run.benchmark.ood}
        parts = [(name, part) for name, dataset in datasets.items() for part in dataset.parts]
        sizes = [pair for name, part in parts for pair in split_numbers(name, part, count(part.source)).items()]
    most = {split: run.limit for split in ("validation", "test") if run.limit is not None}
    return sum(min(number, most.get(split, number)) for split, number in sizes if split in splits)
