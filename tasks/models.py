"""The models that score, loaded once for each device, and what is fitted with them."""

from collections.abc import Hashable, Iterator
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

from diffguard.classifiers import Classifier, import_object, load_classifier
from diffguard.denoisers import LatentDenoiser, PixelDenoiser, load_denoiser
from diffguard.engine import pick_slots
from diffguard.errors import SettingError
from diffguard.scoring import fit_variant
from diffguard.settings import Variant
from tasks.files import fetched, read_images
from tasks.run import Run
from tasks.settings import Baseline
from tasks.train import DENOISER, model_path


@dataclass(frozen=True)
class Models:
    """The models of one seed, and what is fitted with them. Loaded once a process."""

    run: Run
    seed: int
    device: torch.device

    @cached_property
    def denoiser(self) -> PixelDenoiser | LatentDenoiser:
        return load_denoiser(self._file(DENOISER)).to(self.device).channels_last()

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        return {name: load_classifier(self._file(name)).to(self.device) for name in self.run.params.classifiers}

    @cached_property
    def slots(self) -> int:
        """Images in a network call."""
        return self.run.params.score.slots or pick_slots(self.denoiser)

    def _file(self, model: str) -> Path:
        return fetched(model_path(self.run.models(self.seed), model))

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        rows = self.run.manifest[self.run.manifest["split"] == "train"]
        return self.read(rows), torch.tensor(rows["label"].to_numpy(), device=self.device)

    def read(self, rows: pd.DataFrame) -> Tensor:
        """The images of these rows, on the device."""
        return read_images(self.run.home, rows).to(self.device)

    def fitted(self, classifier: str, name: str) -> Variant:
        """A variant with its thresholds set from calibration images."""
        variant = self.run.params.score.variants[name]
        if not variant.needs_fit:
            return variant
        rows = self.run.scored[self.run.scored["split"] == "calibration"]
        batches = (self.read(rows[first : first + 256]) for first in range(0, len(rows), 256))
        return fit_variant(variant, self.denoiser, self.classifiers[classifier], batches)

    @cached_property
    def detectors(self) -> dict[tuple[str, str], Any]:
        return {
            (classifier, name): fit_baseline(name, baseline, network, *self.train)
            for classifier, network in self.classifiers.items()
            for name, baseline in self.run.params.score.baselines.items()
        }


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


def fit_baseline(name: str, baseline: Baseline, classifier: Any, images: Tensor, labels: Tensor) -> Any:
    """Build a pytorch-ood detector, and fit it on the train split where it needs that.

    Raises:
        SettingError: it cannot be imported or built with these arguments.
    """
    model = {
        "logits": lambda: classifier,
        "features": lambda: classifier.features,
        "pixels": lambda: torch.nn.Flatten(),
    }[baseline.sees]()
    factory = import_object(baseline.detector)
    try:
        detector = factory(model, **baseline.arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(f"score.baselines.{name}: {baseline.detector} cannot be built ({error})") from None
    detector.to(images.device)
    if detector.requires_fit:
        detector.fit([(images, labels)])
    return detector


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
