"""The models of a run, loaded once for each device, and what is fitted with them."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from diffguard.detectors.baselines import StoredViews, fit_baseline, needs_fit, views_of
from diffguard.detectors.fitting import fit_variant
from diffguard.detectors.parts import stored_view
from diffguard.diffusion.path_statistics import MOST_IMAGES
from diffguard.engine import Tuning, tune
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser, with_channels_last
from diffguard.settings import AdaptiveStop, Variant
from diffguard.utils.hashing import file_state
from tasks.common.files import is_local, read_images
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run
from tasks.models.checks import check_fits, open_model


def _depends_on_classifier(variant: Variant) -> bool:
    """Whether an inversion depends on the classifier: on its label, or by similarities that may use its features."""
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
        return with_channels_last(denoiser)

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        opened = {}
        for name in self.run.params.classifiers:
            opened[name] = open_model(self.run, self.run.model(self.seed, name))
            check_fits(self.run, name, opened[name])
        return {name: classifier.to(self.device) for name, classifier in opened.items()}

    @cached_property
    def tuning(self) -> Tuning:
        """How the denoiser's network is called, in the precision of most variants."""
        score = self.run.params.score
        precisions = [variant.precision for variant in score.variants.values()] or ["float32"]
        tuning = tune(self.denoiser, max(precisions, key=precisions.count), slots=score.slots)
        print(f"network: {tuning}", flush=True)
        return tuning

    def read(self, rows: pd.DataFrame) -> Tensor:
        """The images of these rows, on the device."""
        return read_images(self.run.home, rows).to(self.device)

    def fitted(self, classifier: str, name: str) -> Variant:
        """A variant with what it takes from images: a stop's thresholds, of calibration; a path's density, of train.

        Raises:
            SettingError: there are too few training images.
        """
        variant = self.run.params.score.variants[name]
        if not variant.needs_fit:
            return variant
        # What does not depend on the classifier is fitted once for all of them.
        key = (classifier if _depends_on_classifier(variant) else "", name)
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
                slots=self.tuning.slots,
            )
        return self._fitted[key]

    @cached_property
    def _fitted(self) -> dict[tuple[str, str], Variant]:
        return {}

    def _batches(self, rows: pd.DataFrame) -> Iterator[Tensor]:
        return (self.read(rows[first : first + 256]) for first in range(0, len(rows), 256))

    @cached_property
    def detectors(self) -> dict[tuple[str, str], Any]:
        image, baselines = self.run.benchmark.image, self.run.params.score.baselines
        shape = (image.channels, image.size, image.size)
        detectors = {}
        for classifier, network in self.classifiers.items():
            views = self._views(network)
            for name, baseline in baselines.items():
                stored = views.get(stored_view(baseline)) if needs_fit(baseline) else None
                train = TrainBatches(self) if stored is None else stored
                detectors[classifier, name] = fit_baseline(
                    name, baseline, network, train, self.device, seen=stored is not None, image_shape=shape
                )
        return detectors

    def _views(self, network: Classifier) -> dict[str, StoredViews]:
        """What several baselines are fitted on, read and evaluated once; images and pixels may not fit in memory."""
        train = TrainBatches(self)
        fitted = [stored_view(each) for each in self.run.params.score.baselines.values() if needs_fit(each)]
        shared = [view for view in ("logits", "features") if fitted.count(view) > 1 and len(train)]
        return {view: StoredViews(*views_of(view, network, train), self.device) for view in shared}


@dataclass(frozen=True)
class TrainBatches:
    """The train split, batch by batch as (images, labels) on the device; read again in each pass."""

    models: Models
    size: int = 256

    @property
    def device(self) -> torch.device:
        return self.models.device

    @property
    def rows(self) -> pd.DataFrame:
        manifest = self.models.run.manifest
        return manifest[manifest["split"] == "train"]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.rows
        for first in range(0, len(rows), self.size):
            batch = rows[first : first + self.size]
            yield self.models.read(batch), torch.tensor(batch["label"].to_numpy(), device=self.device)


_loaded: dict[str, tuple[Hashable, Models]] = {}


def load_models(run: Run, seed: int, device: str) -> Models:
    """The models of one seed on a device; the last ones there stay loaded, until a model or the manifest changes."""
    files = [run.model(seed, name) for name in (DENOISER, *run.params.classifiers)]
    states = tuple(file_state(path) if is_local(path) else None for path in (run.manifest_file, *files))
    key = (run.name, run.own, str(run.home), seed, states)
    if device not in _loaded or _loaded[device][0] != key:
        _loaded[device] = (key, Models(run, seed, torch.device(device)))
    return _loaded[device][1]
