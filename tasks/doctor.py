"""diffguard doctor: what is wrong with a benchmark, and what its run will cost, before hours are spent on it."""

import argparse
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diffguard.engine.engine import Engine, Request, Sample, pick_slots
from diffguard.errors import DataError, DiffGuardError
from diffguard.images import to_tensor
from diffguard.settings import ClassifierTraining, DenoiserTraining, TrainedClassifier, TrainedDenoiser
from diffguard.training import TrainingStep, train_classifier, train_denoiser
from diffguard.utils.finite import check_scores
from diffguard.utils.names import readable
from tasks.fairness import unfair
from tasks.fetch import is_fetched
from tasks.files import read_image
from tasks.image_sources import Drawn, count, listed, passed_over, read_source
from tasks.models import check_label_order, check_models, devices, settled, some_ind_images
from tasks.prepare import check_classes, is_prepared, label_names, label_of, on_both_sides, split_numbers
from tasks.run import Run, open_run
from tasks.settings import DENOISER, SPLITS, Benchmark, Dataset, Part, Split

LOOKED_AT = 64
"""Images of each source that are read, where they are not prepared yet."""

MOST_CLASSES = 10
"""Classes whose images are counted one by one."""

_SPARE, _ROW = 64 * 2**20, 200
"""Bytes: of small files of a run, and of an image's row in a table of scores."""

LONGEST = 180.0
"""Seconds that one image may take here; more is not tried."""


@dataclass
class Report:
    """Prints a line for each thing that was seen to, and counts what is wrong."""

    problems: int = 0

    def line(self, mark: str, subject: str, text: str) -> None:
        print(f"{mark:5} {subject:9} {readable(text)}", flush=True)

    @contextmanager
    def seeing_to(self, subject: str) -> Iterator[Callable[[str], None]]:
        """Yields what to call with what was found; an error of ours is a problem, and the next thing follows."""
        try:
            yield lambda text: self.line("ok", subject, text)
        except DiffGuardError as error:
            self.problems += 1
            self.line("FAIL", subject, str(error))


def examine(run: Run, price: float | None = None) -> int:
    """Print what a run needs and what is wrong with it.

    Args:
        price: of an hour of this machine.

    Returns:
        How many problems there are.
    """
    report = Report()
    params, benchmark = run.params, run.benchmark
    with report.seeing_to("settings") as ok:
        others = len(params.score.names) - len(params.score.variants)
        rows = f"{len(params.score.variants)} variants, {others} others, {len(params.combine)} combinations"
        ok(f"data/benchmarks/{benchmark.name}.yaml: {len(params.classifiers)} classifiers, {rows}")
    manifest = _see_images(report, run)
    models: dict[str, Any] = {}
    with report.seeing_to("models") as ok:
        models = check_models(run)
        for name, model in models.items():
            ok(f"{name}: {_described(run, name, model)}")
    if manifest is not None and models:
        _see_labels(report, run, manifest, models)
    if manifest is not None and models:
        with report.seeing_to("one image") as ok:
            _see_cost(ok, run, manifest, models, price)
    _see_room(report, run, manifest, models)
    return report.problems


def _see_labels(report: Report, run: Run, manifest: pd.DataFrame, models: dict[str, Any]) -> None:
    """Whether each classifier's labels are in the order of the benchmark's classes."""
    if "image" in manifest:
        rows = manifest[manifest["role"] == "ind"]
        labels = rows["label"].tolist()
        images = torch.stack([to_tensor(picture) for picture in rows["image"]])
    else:
        images, labels = some_ind_images(run)
    for name in run.params.classifiers:
        with report.seeing_to("labels"):
            if warning := check_label_order(run, name, models[name], images, labels):
                report.line("warn", "labels", warning)


def _see_images(report: Report, run: Run) -> pd.DataFrame | None:
    """The manifest, or, of what is not prepared yet, one of a few images of each dataset, unwritten."""
    benchmark = run.benchmark
    with report.seeing_to("images") as ok:
        if run.recorded_seeds is None:
            ready = is_prepared(benchmark, run.home, run.params.prepare.seed)
        else:
            ready = (run.home / "manifest.parquet").is_file()
        names = run.classes if ready else label_names(benchmark)
        ok(f"{len(names)} classes: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}")
        away = [each for each, at in benchmark.downloads.items() if not is_fetched(each, at, run.home / "downloads")]
        if away:
            command = f"python -m tasks.fetch --benchmark {benchmark.name}"
            ok(f"{', '.join(away)}: not fetched yet; the run does it, or {command}")
            return None
        if ready:
            manifest = run.manifest
            for (role, dataset), rows in manifest.groupby(["role", "dataset"], sort=False):
                splits = ", ".join(f"{split} {number}" for split, number in rows["split"].value_counts().items())
                ok(f"{role} {dataset}: {splits}")
                if role == "ind":
                    ok(f"ind: {_of_each_class(rows['label'], names)}")
        else:
            found = _looked_at(report, run, names)
            if found is None:
                return None
            manifest = found
        for warning in unfair(manifest):
            report.line("warn", "fairness", warning)
        return manifest
    return None


def _looked_at(report: Report, run: Run, names: list[str]) -> pd.DataFrame | None:
    """A manifest of some images of each part, once all labels were seen to; None if anything is wrong."""
    benchmark, before = run.benchmark, report.problems
    roles: dict[str, dict[str, Dataset]] = {"ind": benchmark.ind, "near": benchmark.near, "far": benchmark.far}
    rows: list[dict[str, Any]] = []
    labels: list[int] = []
    seen: dict[bytes, dict[str, Any]] = {}
    for role, datasets in roles.items():
        for name, dataset in datasets.items():
            for part in dataset.parts:
                with report.seeing_to("images") as ok:
                    labels += _labels(part, names, name) if role == "ind" else []
                    whole = sum(split_numbers(name, part, count(part.source)).values())
                    some = _some_images(run, names, role, name, part)
                    _see_sides(benchmark, some, seen)
                    rows += some
                    if told := passed_over(part.source):
                        report.line("warn", "images", f"{role} {name}: {told}")
                    ok(f"{role} {name}: {whole} images, of which {min(LOOKED_AT, whole)} were read; not prepared yet")
    if labels and report.problems == before:
        with report.seeing_to("images") as ok:
            check_classes(benchmark, names, set(labels))
            ok(f"ind: {_of_each_class(labels, names)}")
    return pd.DataFrame(rows) if report.problems == before else None


def _some_images(run: Run, names: list[str], role: str, dataset: str, part: Part) -> list[dict[str, Any]]:
    form = run.benchmark.image
    position = {name: label for label, name in enumerate(names)}
    return [
        {
            "role": role,
            "label": label_of(found, position, len(names), dataset) if role == "ind" else -1,
            "dataset": dataset,
            "split": "",
            "drawn": isinstance(part.source, Drawn),
            "origin": found.origin,
            "image": found.formatted(form),
            "source_format": found.format,
            "source_width": found.width,
            "source_height": found.height,
            "source_quality": found.quality,
            "source_bytes": found.bytes,
        }
        for found in islice(read_source(part.source, np.random.default_rng(0)), LOOKED_AT)
    ]


def _see_sides(benchmark: Benchmark, rows: list[dict[str, Any]], seen: dict[bytes, dict[str, Any]]) -> None:
    """Raise a DataError if an image is InD and OOD, where that stops the run; seen: the rows before, by pixels."""
    for row in rows:
        other = seen.setdefault(row["image"].tobytes(), row)
        sides_differ = (other["role"] == "ind") != (row["role"] == "ind")
        if sides_differ and not row["drawn"] and benchmark.duplicates == "error":
            raise on_both_sides(benchmark, row["origin"], other["origin"])


def _labels(part: Part, names: list[str], dataset: str) -> list[int]:
    """The labels of all InD images of a part, of which none is read; of drawn ones, whose labels are theirs, none."""
    if isinstance(part.source, Drawn):
        return []
    position = {name: label for label, name in enumerate(names)}
    return [label_of(found, position, len(names), dataset) for found in listed(part.source)]


def _of_each_class(labels: Iterable[int], names: list[str]) -> str:
    """How many images each class has, or of many classes the fewest and the most."""
    counts = Counter(labels)
    if len(counts) <= MOST_CLASSES:
        return ", ".join(f"{names[label]} {images}" for label, images in sorted(counts.items()))
    (most, highest), (fewest, lowest) = counts.most_common()[0], counts.most_common()[-1]
    return f"{len(counts)} classes, of {lowest} images ({names[fewest]}) to {highest} ({names[most]})"


def _count(run: Run, splits: set[Split]) -> int:
    """Images of these splits, at most `limit` of each dataset of validation and test."""
    manifest = run.home / "manifest.parquet"
    if manifest.is_file():
        numbers = run.manifest.groupby(["dataset", "split"]).size()
        found = [(split, int(number)) for (_, split), number in numbers.items()]
    else:
        datasets = {**run.benchmark.ind, **run.benchmark.ood}
        parts = [(name, part) for name, dataset in datasets.items() for part in dataset.parts]
        found = [pair for name, part in parts for pair in split_numbers(name, part, count(part.source)).items()]
    most = {split: run.limit for split in ("validation", "test") if run.limit is not None}
    return sum(min(number, most.get(split, number)) for split, number in found if split in splits)


def _described(run: Run, name: str, model: Any) -> str:
    spec = run.benchmark.denoiser if name == DENOISER else run.benchmark.classifiers[name]
    networks = [model] if isinstance(model, torch.nn.Module) else _parts(model)
    size = sum(each.numel() for network in networks for each in network.parameters()) / 1e6
    what = f"{type(getattr(model, 'network', model)).__name__}, {size:.1f} M parameters"
    if isinstance(spec, TrainedClassifier | TrainedDenoiser) and not run.model(run.params.seeds[0], name).exists():
        return f"{what}, to be trained"
    return what


def _parts(denoiser: Any) -> list[torch.nn.Module]:
    inner = getattr(denoiser, "_denoiser", denoiser)
    return [each for each in vars(inner).values() if isinstance(each, torch.nn.Module)]


def _see_cost(
    ok: Callable[[str], None], run: Run, manifest: pd.DataFrame, models: dict[str, Any], price: float | None
) -> None:
    """Score one image by everything, and tell what all of them will take."""
    device = torch.device(devices()[0])
    models = {name: model.to(device) for name, model in models.items()}
    image = _first_image(run, manifest).to(device)
    requests = [
        Request(models[name], settled(variant))
        for name in run.params.classifiers
        for variant in run.params.score.variants.values()
    ]
    training = sum(_training_seconds(run, name, image, device) for name in models) * len(run.params.seeds)
    images = _count(run, {"calibration", "validation", "test"})
    if not requests:
        ok("no variants: scoring takes no network of the denoiser")
        seconds = 0.0
    else:
        seconds = _scoring_seconds(ok, run, models[DENOISER], requests, image) * images * len(run.params.seeds)
    # The variants ask a classifier once, and so do all baselines that see logits; those that see features, each.
    sees = [each.sees for each in run.params.score.baselines.values()]
    looks = bool(requests) + ("logits" in sees) + sees.count("features")
    look = sum(_look_seconds(models[name], image) for name in run.params.classifiers)
    seconds += look * looks * images * len(run.params.seeds)
    total = training + seconds
    cost = "" if price is None else f", {price * total / 3600:.2f} at {price:g} an hour"
    ok(f"on {device}: scoring {images} images about {_time(seconds)}, training {_time(training)}{cost}")


def _first_image(run: Run, manifest: pd.DataFrame) -> Tensor:
    row = manifest[manifest["role"] == "ind"].iloc[0]
    if "image" in manifest:
        return to_tensor(row["image"])
    return read_image(run.home, row["path"], row["content_hash"])


def _scoring_seconds(
    ok: Callable[[str], None], run: Run, denoiser: Any, requests: list[Request], image: Tensor
) -> float:
    """Seconds an image, once one image went end to end."""
    slots = run.params.score.slots or pick_slots(denoiser)
    alone, together = (_call_seconds(denoiser, size) for size in (1, slots))
    most = sum(3 * request.variant.max_level for request in requests)
    if alone * most > LONGEST:
        ok(f"one call takes {alone:.1f} s on this device: one image, up to {most} of them, is not tried")
        return together / slots * most
    engine = Engine(denoiser, requests, slots=1)
    before = time.perf_counter()
    [(_, found)] = engine.run([Sample(0, image)])
    taken = time.perf_counter() - before
    evaluations = engine.stats.evaluations
    for index, each in found.items():
        check_scores([each.score], f"distance {requests[index].variant.distance}")
    scores = ", ".join(f"{each.score:.3g}" for each in list(found.values())[:3])
    ok(f"{evaluations} network evaluations in {_time(taken)}; scores {scores}{', …' if len(found) > 3 else ''}")
    # What is not the network is taken as it was for one image; batches make it less.
    return evaluations * together / slots + max(0.0, taken - evaluations * alone) / max(1, slots // 4)


@torch.no_grad()
def _look_seconds(classifier: Any, image: Tensor) -> float:
    """Seconds an image that a classifier takes, of a few at once."""
    few = image[None].repeat(8, 1, 1, 1)
    classifier(few)  # the first prepares
    before = time.perf_counter()
    classifier(few).sum().item()  # waits for a GPU
    return (time.perf_counter() - before) / len(few)


@torch.no_grad()
def _call_seconds(denoiser: Any, size: int) -> float:
    """Seconds of a network call with so many images."""
    latents = denoiser.encode(torch.zeros(1, *denoiser.image_shape, device=denoiser.device))
    x = latents.expand(size, *latents.shape[1:]).contiguous()
    where = torch.zeros(size, dtype=torch.long, device=x.device)
    times = []
    for _ in range(3):
        before = time.perf_counter()
        denoiser.eps(x, where, where).sum().item()  # waits for a GPU
        times.append(time.perf_counter() - before)
        if times[-1] > 20:
            break
    return min(times)


def _training_seconds(run: Run, name: str, image: Tensor, device: torch.device) -> float:
    """What is left of a model's training, by a few steps of it; its time budget at most."""
    spec = run.benchmark.denoiser if name == DENOISER else run.benchmark.classifiers[name]
    if run.model(run.params.seeds[0], name).exists():
        return 0.0
    images = image.cpu()[None].repeat(spec.batch_size, 1, 1, 1) if hasattr(spec, "batch_size") else image
    stamps: list[tuple[int, float]] = []

    def progress(step: TrainingStep) -> None:
        stamps.append((step.step, time.perf_counter()))

    labels = torch.zeros(len(images), dtype=torch.int64)
    if isinstance(spec, TrainedClassifier):
        few = ClassifierTraining(**spec.model_dump(exclude={"kind", "epochs", "minutes"}), epochs=4)
        train_classifier(images, labels, len(_names(run)), few, 0, progress, device=device)
        rows = _count(run, {"train"})
        steps = spec.epochs * (rows // min(spec.batch_size, rows)) if rows else 0
    elif isinstance(spec, TrainedDenoiser):
        fewer = DenoiserTraining(**spec.model_dump(exclude={"kind", "iterations", "minutes"}), iterations=4)
        train_denoiser(images, labels, len(_names(run)), fewer, 0, progress, device=device)
        steps = spec.iterations
    else:
        return 0.0
    (first, began), (last, ended) = stamps[0], stamps[-1]
    seconds = steps * (ended - began) / (last - first)
    return min(seconds, 60 * spec.minutes) if spec.minutes is not None else seconds


def _names(run: Run) -> list[str]:
    return run.classes if (run.home / "manifest.parquet").is_file() else label_names(run.benchmark)


def _see_room(report: Report, run: Run, manifest: pd.DataFrame | None, models: dict[str, Any]) -> None:
    """Memory that this check took, and what there is of memory and disk."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{peak:.1f} GiB of {there:.0f} GiB were taken here"
    if torch.cuda.is_available():
        taken, room = (
            torch.cuda.max_memory_allocated() / 2**30,
            torch.cuda.get_device_properties(0).total_memory / 2**30,
        )
        text += f"; {taken:.1f} GiB of the GPU's {room:.0f} GiB"
    if manifest is not None and any(
        isinstance(each, TrainedClassifier | TrainedDenoiser)
        for each in (run.benchmark.denoiser, *run.benchmark.classifiers.values())
    ):
        image = run.benchmark.image
        held = _count(run, {"train"}) * image.size**2 * (3 if image.mode == "RGB" else 1) / 2**30
        text += f"; training holds {held:.2f} GiB of images"
    report.line("ok", "memory", text)
    folder = next(each for each in (run.home, *run.home.parents) if each.exists())
    free, needed = shutil.disk_usage(folder).free / 2**30, _disk_needed(run, manifest, models) / 2**30
    with report.seeing_to("disk") as ok:
        told = f"{free:.1f} GiB are free, and the run takes about {needed:.1f}"
        if free < needed:
            raise DataError(f"{folder}: {told}; make room")
        ok(told)


def _disk_needed(run: Run, manifest: pd.DataFrame | None, models: dict[str, Any]) -> float:
    """Bytes that a run will write at most, roughly: images, models with a checkpoint of their training, scores."""
    image = run.benchmark.image
    needed = float(_SPARE)
    if manifest is not None:
        is_prepared_already = "image" not in manifest
        images = 0 if is_prepared_already else _count(run, set(SPLITS))
        rows = _count(run, {"calibration", "validation", "test"}) * len(run.params.classifiers)
        # Both DVC's cache and MLflow keep what is scored.
        needed += images * image.size**2 * image.channels + 2 * _ROW * rows * len(run.params.names)
    for name, model in models.items():
        networks = [model] if isinstance(model, torch.nn.Module) else _parts(model)
        if not run.model(run.params.seeds[0], name).exists():
            # A training keeps weights, their averages and two moments beside the model itself.
            needed += 5 * 4 * sum(each.numel() for network in networks for each in network.parameters())
    return needed * len(run.params.seeds)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def command(arguments: Sequence[str]) -> int:
    """`diffguard doctor`; returns the exit code: 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="diffguard doctor", description=__doc__)
    parser.add_argument("--benchmark", help="a file of data/benchmarks/; params.yaml's if not given")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--limit", type=int, help="the most images of each dataset of validation and test")
    parser.add_argument("--price", type=float, help="of an hour of this machine, to tell what the run costs")
    options = parser.parse_args(arguments)
    problems = examine(open_run(benchmark=options.benchmark, root=options.root, limit=options.limit), options.price)
    print(f"\n{problems} problem{'s' if problems != 1 else ''} found" if problems else "\nnothing is wrong")
    return 1 if problems else 0
