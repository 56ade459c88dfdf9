"""The models of a benchmark: opened, checked against it, loaded once for each device, and what is fitted with them."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from diffguard.detectors.baselines import fit_baseline
from diffguard.detectors.fitting import fit_variant
from diffguard.diffusion.path_statistics import MOST_IMAGES
from diffguard.engine.engine import Request, check_request, pick_slots
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier, predict_logits
from diffguard.models.denoisers.base import Denoiser
from diffguard.models.folder import open_model as open_folder
from diffguard.models.folder import open_spec
from diffguard.settings import STANDARD_PATH, AdaptiveStop, TrainedClassifier, TrainedDenoiser, Variant
from diffguard.training import untrained_classifier, untrained_denoiser
from tasks.files import fetched, read_images
from tasks.label_order import MOST_IMAGES as MOST_TO_CHECK
from tasks.label_order import check_order
from tasks.run import Run
from tasks.settings import DENOISER


def open_model(run: Run, folder: Path) -> Any:
    """The model of a folder that the stage train wrote.

    Raises:
        DataError: it is missing, or what it refers to has other weights by now.
    """
    return open_folder(fetched(folder), run.classes, run.benchmark.image.size, run.code)


def needs_labels(variant: Variant) -> bool:
    """Whether it asks the denoiser for labels."""
    return variant.guidance.kind in ("label", "all-labels") or variant.inversion_scale is not None


def check_models(run: Run) -> dict[str, Any]:
    """Open every model of a run and see that all agree with the benchmark and its variants.

    One that is to be trained is there as it will begin.

    Returns:
        The models by name, on the CPU.

    Raises:
        SettingError, DataError, ServiceError: one does not, or cannot be opened.
    """
    opened = {}
    for name in (DENOISER, *run.params.classifiers):
        opened[name] = _there_or_new(run, name)
        check_fits(run, name, opened[name])
    for name in run.params.classifiers:
        for each, variant in run.params.score.variants.items():
            try:
                check_request(Request(opened[name], settled(variant)), opened[DENOISER])
            except SettingError as error:
                raise SettingError(f"variant {each}: {error}") from None
    return opened


def check_label_order(run: Run, name: str, classifier: Any, images: Tensor, labels: Sequence[int]) -> str:
    """See that a classifier's labels are in the order of the benchmark's classes; one to be trained will be.

    Args:
        images: InD, [N, C, H, W] in [0, 1]. labels: of these.

    Returns:
        A warning; "": there is none.

    Raises:
        DataError: they are not; see `tasks.label_order.check_order`.
    """
    is_trained = isinstance(run.benchmark.classifiers[name], TrainedClassifier)
    if not labels or (is_trained and not run.model(run.params.seeds[0], name).exists()):
        return ""
    predicted = predict_logits(classifier, images).argmax(dim=1).cpu().numpy()
    where = f"data/benchmarks/{run.benchmark.name}.yaml: classifier {name}"
    return check_order(where, run.classes, labels, predicted)


def some_ind_images(run: Run) -> tuple[Tensor, list[int]]:
    """InD images of a prepared benchmark's calibration split, at most `MOST_TO_CHECK`, with their labels."""
    rows = run.manifest[(run.manifest["role"] == "ind") & (run.manifest["split"] == "calibration")]
    rows = rows.sort_values("content_hash")[:MOST_TO_CHECK]
    return read_images(run.home, rows), rows["label"].tolist()


def _there_or_new(run: Run, name: str) -> Any:
    folder = run.model(run.params.seeds[0], name)
    if folder.exists():
        return open_model(run, folder)
    spec = run.benchmark.denoiser if name == DENOISER else run.benchmark.classifiers[name]
    image = run.benchmark.image
    shape = (image.channels, image.size, image.size)
    if isinstance(spec, TrainedDenoiser):
        return untrained_denoiser(shape, len(run.classes), spec)
    if isinstance(spec, TrainedClassifier):
        return untrained_classifier(shape[0], len(run.classes), spec).eval().requires_grad_(False)
    return open_spec(spec, run.classes, image.size)


def settled(variant: Variant) -> Variant:
    """With what images would set replaced: a stop by the latest, the Gaussian of paths by the standard one."""
    changes: dict[str, Any] = {"stop": variant.max_level} if variant.needs_calibration else {}
    if variant.needs_train:
        changes["path"] = STANDARD_PATH
    return variant.model_copy(update=changes)


def check_fits(run: Run, name: str, model: Any) -> None:
    """Check that a model and a benchmark agree, before anything runs.

    Raises:
        SettingError: on labels, their order, channels or size; the message names the model and both values.
    """
    where, image = f"data/benchmarks/{run.benchmark.name}.yaml: {name}", run.benchmark.image
    channels = image.channels
    if name == DENOISER:
        takes, side, _ = model.image_shape
        if model.num_labels not in (0, len(run.classes)):
            raise SettingError(f"{where}: it knows {model.num_labels} labels, the benchmark has {len(run.classes)}")
        if takes != channels:
            raise SettingError(f"{where}: it takes images of {takes} channels; the benchmark's mode is {image.mode}")
        unsized = [each for each, variant in run.params.score.variants.items() if variant.process_method == "none"]
        if side != image.size and unsized:
            raise SettingError(
                f"{where}: it takes images of {side} pixels, the benchmark's have {image.size}; "
                f"set process_method to resize or pad (variant {unsized[0]} has none)"
            )
        return
    if model.num_classes < len(run.classes):
        raise SettingError(f"{where}: it has {model.num_classes} classes, the benchmark {len(run.classes)}")
    _check_order(where, run.classes, getattr(model, "class_names", None) or [])
    if model.num_classes > len(run.classes) and not isinstance(run.benchmark.denoiser, TrainedDenoiser):
        guided = [each for each, variant in run.params.score.variants.items() if needs_labels(variant)]
        if guided:
            raise SettingError(
                f"{where}: it has {model.num_classes} classes, the benchmark {len(run.classes)}; variant {guided[0]} "
                "asks the denoiser for a label of each: give all of them as classes, and the denoiser's labels"
            )
    if (takes := getattr(model, "in_channels", None)) not in (None, channels):
        raise SettingError(f"{where}: it takes images of {takes} channels; the benchmark's mode is {image.mode}")
    if (side := getattr(model, "input_size", None)) not in (None, image.size):
        raise SettingError(f"{where}: it takes images of {side} pixels; the benchmark's image.size is {image.size}")


def _check_order(where: str, classes: list[str], known: list[str]) -> None:
    """Raise a SettingError if a classifier knows a class of the benchmark by another label. Other names say nothing."""
    for label, (name, own) in enumerate(zip(classes, known, strict=False)):
        if name != own and name in known:
            raise SettingError(
                f"{where}: its label {known.index(name)} is {name!r}, the benchmark's {label}; "
                "give classes in the classifier's order"
            )


def _looks_at_classifier(variant: Variant) -> bool:
    """Whether an inversion depends on the classifier: on its label, or by similarities that may look through it."""
    thresholds = variant.stop.thresholds if isinstance(variant.stop, AdaptiveStop) else {}
    return variant.inversion_scale is not None or bool(set(thresholds) - {"psnr"})


@dataclass(frozen=True)
class Models:
    """The models of one seed, and what is fitted with them. Loaded once a process."""

    run: Run
    seed: int
    device: torch.device

    @cached_property
    def denoiser(self) -> Denoiser:
        opened = open_model(self.run, self.run.model(self.seed, DENOISER))
        check_fits(self.run, DENOISER, opened)
        denoiser: Denoiser = opened.to(self.device)
        return denoiser.channels_last() if hasattr(denoiser, "channels_last") else denoiser

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        opened = {}
        for name in self.run.params.classifiers:
            opened[name] = open_model(self.run, self.run.model(self.seed, name))
            check_fits(self.run, name, opened[name])
        return {name: each.to(self.device) for name, each in opened.items()}

    @cached_property
    def slots(self) -> int:
        """Images in a network call."""
        return self.run.params.score.slots or pick_slots(self.denoiser)

    def read(self, rows: pd.DataFrame) -> Tensor:
        """The images of these rows, on the device."""
        return read_images(self.run.home, rows).to(self.device)

    def fitted(self, classifier: str, name: str) -> Variant:
        """A variant with what it takes from images: a stop's thresholds, of calibration; a path's Gaussian, of train.

        Raises:
            SettingError: there are too few training images.
        """
        variant = self.run.params.score.variants[name]
        if not variant.needs_fit:
            return variant
        # What does not look at a classifier is the same for all of them.
        key = (classifier if _looks_at_classifier(variant) else "", name)
        if key not in self._fitted:
            calibration = self.run.scored[self.run.scored["split"] == "calibration"]
            train = self.run.manifest[self.run.manifest["split"] == "train"]
            train = train.sort_values("content_hash")[:MOST_IMAGES]
            network = self.classifiers[classifier]
            self._fitted[key] = fit_variant(
                variant,
                self.denoiser,
                network,
                self._batches(calibration),
                self._batches(train),
                slots=self.slots,
            )
        return self._fitted[key]

    @cached_property
    def _fitted(self) -> dict[tuple[str, str], Variant]:
        return {}

    def _batches(self, rows: pd.DataFrame) -> Iterator[Tensor]:
        return (self.read(rows[first : first + 256]) for first in range(0, len(rows), 256))

    @cached_property
    def detectors(self) -> dict[tuple[str, str], Any]:
        train = TrainBatches(self)
        return {
            (classifier, name): fit_baseline(name, baseline, network, train, self.device)
            for classifier, network in self.classifiers.items()
            for name, baseline in self.run.params.score.baselines.items()
        }


@dataclass(frozen=True)
class TrainBatches:
    """The train split, batch by batch as (images, labels) on the device; read anew each time."""

    models: Models
    size: int = 256

    @property
    def device(self) -> torch.device:
        return self.models.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        manifest = self.models.run.manifest
        rows = manifest[manifest["split"] == "train"]
        for first in range(0, len(rows), self.size):
            some = rows[first : first + self.size]
            yield self.models.read(some), torch.tensor(some["label"].to_numpy(), device=self.device)


_loaded: dict[str, tuple[Hashable, Models]] = {}


def load_models(run: Run, seed: int, device: str) -> Models:
    """The models of one seed on a device; the last ones there stay loaded."""
    key = (run.name, run.own, str(run.home), seed)
    if device not in _loaded or _loaded[device][0] != key:
        _loaded[device] = (key, Models(run, seed, torch.device(device)))
    return _loaded[device][1]


def devices() -> list[str]:
    """The devices of this machine that score: its GPUs, or its processor."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


_idle: Queue[str] = Queue()
_known: list[str] = []
_leasing = Lock()


@contextmanager
def leased_device() -> Iterator[str]:
    """A device of this machine to oneself; waits while others have them all."""
    with _leasing:
        if not _known:
            _known.extend(devices())
            for each in _known:
                _idle.put(each)
    device = _idle.get()
    try:
        yield device
    finally:
        _idle.put(device)
