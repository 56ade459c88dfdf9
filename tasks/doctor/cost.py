"""Estimates the time that a run takes, from measurements on one image."""

import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor

from diffguard.engine import Engine, Request, Sample, core_count, tune
from diffguard.images import to_tensor
from diffguard.settings import TrainedClassifier, TrainedDenoiser
from diffguard.training import TrainingStep, train_classifier, train_denoiser
from diffguard.utils.finite import check_scores
from tasks.common.devices import devices
from tasks.common.files import read_image
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run
from tasks.doctor.images import image_count
from tasks.models.checks import settled

LONGEST = 180.0
"""Seconds that one image may take here; more is not tried."""

EVALUATIONS = {"features": 1, "maps": 2, "layers": 3}
"""Of the classifier for an image, by what a baseline sees."""


def estimate_cost(
    ok: Callable[[str], None], run: Run, manifest: pd.DataFrame, models: dict[str, Any], price: float | None
) -> None:
    """Score one image by all variants, and print how long all images and the trainings take."""
    device = torch.device(devices()[0])
    models = {name: model.to(device) for name, model in models.items()}
    image = _first_image(run, manifest).to(device)
    requests = [
        Request(models[name], settled(variant))
        for name in run.params.classifiers
        for variant in run.params.score.variants.values()
    ]
    training = sum(_training_seconds(run, name, image, device) for name in models) * len(run.params.seeds)
    images = image_count(run, {"calibration", "validation", "test"})
    if not requests:
        ok("no variants: scoring takes no network of the denoiser")
        seconds = 0.0
    else:
        seconds = _scoring_seconds(ok, run, models[DENOISER], requests, image) * images * len(run.params.seeds)
    # Variants share one evaluation of a classifier, and so do baselines on logits; those on features take one each,
    # those on maps two where the rest of the network runs again, and a gradient about two more.
    sees = [baseline.sees for baseline in run.params.score.baselines.values()]
    evaluations = bool(requests) + ("logits" in sees) + sum(EVALUATIONS.get(each, 0) for each in sees)
    classifier_seconds = sum(_classifier_seconds(models[name], image) for name in run.params.classifiers)
    seconds += classifier_seconds * evaluations * images * len(run.params.seeds)
    total = training + seconds
    cost = "" if price is None else f", {price * total / 3600:.2f} at {price:g} an hour"
    ok(f"on {device}: scoring {images} images about {_time(seconds)}, training {_time(training)}{cost}")


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores other programs take, over so many seconds; 0 where it is less than half of one."""
    busy = psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)
    return busy if busy >= 0.5 else 0.0


def _first_image(run: Run, manifest: pd.DataFrame) -> Tensor:
    row = manifest[manifest["role"] == "ind"].iloc[0]
    if "image" in manifest:
        return to_tensor(row["image"])
    return read_image(run.home, row["path"], row["content_hash"])


def _scoring_seconds(
    ok: Callable[[str], None], run: Run, denoiser: Any, requests: list[Request], image: Tensor
) -> float:
    """Estimate the seconds an image takes, by scoring one end to end."""
    alone, most = _denoiser_seconds(denoiser), sum(3 * request.variant.max_level for request in requests)
    if alone * most > LONGEST:
        ok(f"one call takes {alone:.1f} s on this device: one image, up to {most} of them, is not tried")
        return alone * most
    precisions = [request.variant.precision for request in requests]
    tuning = tune(denoiser, max(precisions, key=precisions.count), slots=run.params.score.slots)
    ok(f"{tuning}")
    # Twice: what is done once, such as preparing kernels, says nothing of the other images.
    for _ in range(2):
        engine = Engine(denoiser, requests, slots=1)
        before = time.perf_counter()
        [(_, results)] = engine.run([Sample(0, image)])
        taken = time.perf_counter() - before
    evaluations = engine.stats.evaluations
    for index, result in results.items():
        check_scores([result.score], f"distance {requests[index].variant.distance}")
    scores = ", ".join(f"{result.score:.3g}" for result in list(results.values())[:3])
    ok(f"{evaluations} network evaluations in {_time(taken)}; scores {scores}{', …' if len(results) > 3 else ''}")
    # The rest of the time is scaled from one image; batches make it less.
    rest = max(0.0, taken - evaluations * alone) / max(1, tuning.slots // 4)
    processes = core_count() if denoiser.device.type == "cpu" else 1
    return (evaluations / tuning.rate + rest) / processes


@torch.no_grad()
def _classifier_seconds(classifier: Any, image: Tensor) -> float:
    """Seconds an image that a classifier takes, of a few at once."""
    few = image[None].repeat(8, 1, 1, 1)
    classifier(few)  # the first prepares
    before = time.perf_counter()
    classifier(few).sum().item()  # waits for a GPU
    return (time.perf_counter() - before) / len(few)


@torch.no_grad()
def _denoiser_seconds(denoiser: Any) -> float:
    """Seconds of a network call with one image."""
    x = denoiser.encode(torch.zeros(1, *denoiser.image_shape, device=denoiser.device))
    zero = torch.zeros(1, dtype=torch.long, device=x.device)
    times = []
    for _ in range(3):
        before = time.perf_counter()
        denoiser.eps(x, zero, zero).sum().item()  # waits for a GPU
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
        few = spec.model_copy(update={"epochs": 4, "minutes": None})
        train_classifier(images, labels, len(run.classes), few, 0, progress, device=device)
        rows = image_count(run, {"train"})
        steps = spec.epochs * (rows // min(spec.batch_size, rows)) if rows else 0
    elif isinstance(spec, TrainedDenoiser):
        fewer = spec.model_copy(update={"iterations": 4, "minutes": None})
        train_denoiser(images, labels, len(run.classes), fewer, 0, progress, device=device)
        steps = spec.iterations
    else:
        return 0.0
    (first, began), (last, ended) = stamps[0], stamps[-1]
    seconds = steps * (ended - began) / (last - first)
    return min(seconds, 60 * spec.minutes) if spec.minutes is not None else seconds


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
