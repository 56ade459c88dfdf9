"""The rows that a deployed detector is made of, variants, baselines and combinations, ready to score images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffguard.calibration.conformal import Array
from diffguard.deploy.info import DetectorInfo
from diffguard.detectors.baselines import StoredViews, detect, fit_baseline, needs_fit
from diffguard.detectors.combination import Combined
from diffguard.detectors.parts import stored_view
from diffguard.engine import (
    Engine,
    EngineProcesses,
    Request,
    Sample,
    ScoreResult,
    Tuning,
    open_processes,
    pick_threads,
    tune,
)
from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import Baseline, Combination, ImageFormat, Variant
from diffguard.utils.finite import check_scores

MEASURED = 8
"""From so many images on it is worth a second to measure how the network is called; fewer are in calls of this size."""


class Scorer:
    """Scores images under the rows of a detector. Not for two threads at once.

    Args:
        info: the detector.
        classifier, denoiser: on the device where images are scored.
        calibration: each row's scores of the calibration images [n].
        seen, slots: see `diffguard.deploy.detector.DeployedDetector`.

    Attributes:
        variants, baselines, combined: the rows by name, what baselines and combinations need fitted.

    Raises:
        SettingError: a row cannot be deployed. DataError: what a baseline is fitted on is missing.
    """

    def __init__(
        self,
        info: DetectorInfo,
        classifier: Any,
        denoiser: Denoiser | None,
        calibration: Mapping[str, Array],
        seen: Mapping[str, tuple[Tensor, Tensor]],
        slots: int | None,
    ) -> None:
        self.info, self.classifier, self.denoiser = info, classifier, denoiser
        self.device = next(classifier.parameters()).device if denoiser is None else denoiser.device
        for name in info.rows_of(info.detector):
            _check_deployable(name, info.settings_of(name), denoiser, info.image)
        self.variants: dict[str, Variant] = self._of(Variant)
        shape = (info.image.channels, info.image.size, info.image.size)
        self.baselines = {
            name: fit_baseline(
                name, baseline, classifier, self._train(baseline, seen), self.device, seen=True, image_shape=shape
            )
            for name, baseline in self._of(Baseline).items()
        }
        self.combined = {name: Combined.from_json(info.combined[name], calibration) for name in self._of(Combination)}
        self._slots = slots
        self._expected = 0
        self._most_processes: int | None = None
        self._tuning: Tuning | None = None
        self._engine: Engine | None = None
        self._processes: EngineProcesses | None = None

    def expect(self, images: int, processes: int | None) -> None:
        """Prepare for so many images; see `diffguard.deploy.detector.DeployedDetector.expect`."""
        self._expected, self._most_processes = images, processes
        if self.denoiser is not None and images >= MEASURED:
            self._tune()
            self._open_processes()

    def start(self) -> int:
        """Start what is expected to be needed; returns in how many threads this process diffuses one image fastest."""
        if self.denoiser is None:
            return torch.get_num_threads()
        if self._processes is not None:
            self._processes.start()
        return pick_threads(self.denoiser, self._tuning or self._tune())

    def batch(self, images: Tensor) -> "BatchScores":
        """The scores of prepared images [B, C, H, W] in [0, 1], on any device; computed as they are asked for."""
        return BatchScores(self, images)

    def explain(self, image: Tensor) -> tuple[ScoreResult | None, Variant | None]:
        """The result of the first variant that reconstructs, with both its reconstructions of an image [C, H, W].

        None, None: there is no such variant.
        """
        variants = list(self.variants.values())
        index = next((index for index, variant in enumerate(variants) if variant.reconstructs), None)
        if index is None:
            return None, None
        [(_, results)] = self.diffuse([Sample(0, image, [index], unconditional=True)])
        return results[index], variants[index]

    def diffuse(self, samples: Sequence[Sample]) -> Iterator[tuple[Any, dict[int, ScoreResult]]]:
        """Samples through the one engine, whose requests are the variants in their order."""
        if self._tuning is None and len(samples) >= MEASURED:
            self._tune()
        processes = self._processes
        try:
            yield from (self._own_engine() if processes is None or len(samples) == 1 else processes).run(samples)
        except BaseException:
            # Images at work would come out of the next run.
            self._engine = None
            if processes is not None:
                self._open_processes()
            raise

    def _tune(self) -> Tuning:
        """Measure how the network is called."""
        assert self.denoiser is not None
        precisions = [variant.precision for variant in self.variants.values()]
        precision = max(precisions, key=precisions.count) if precisions else "float32"
        self._tuning = tune(self.denoiser, precision, slots=self._slots, largest=64, seconds=1.0)
        self._engine = None
        return self._tuning

    def _open_processes(self) -> None:
        """Start the processes that the expected images are worth, in place of those that there are."""
        assert self.denoiser is not None
        assert self._tuning is not None
        if self._processes is not None:
            self._processes.close()
        self._processes = open_processes(
            self.denoiser, self._requests(), self._tuning, self._expected, self._most_processes
        )

    def _own_engine(self) -> Engine:
        """The engine of this process."""
        assert self.denoiser is not None
        if self._engine is None:
            # Requests of few images must not wait for a full batch's time.
            self._engine = Engine(
                self.denoiser, self._requests(), slots=self._tuning or self._slots or MEASURED, fixed=False
            )
        return self._engine

    def _requests(self) -> list[Request]:
        return [Request(self.classifier, variant) for variant in self.variants.values()]

    def _of(self, kind: Any) -> dict[str, Any]:
        settings = {name: self.info.settings_of(name) for name in self.info.rows_of(self.info.detector)}
        return {name: one for name, one in settings.items() if isinstance(one, kind)}

    def _train(self, baseline: Baseline, seen: Mapping[str, tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        if not needs_fit(baseline):
            return ()
        view = stored_view(baseline)
        if view not in seen:
            raise DataError(f"detector {self.info.detector}: the {view} that a baseline is fitted on are missing")
        return StoredViews(*seen[view], self.device)


class BatchScores:
    """The scores of one batch under every row, computed when they are needed, each once.

    Attributes:
        logits: the classifier's, [B, num_classes].
        results: of those images that were diffused, by their row in the batch and the variant's index.
    """

    def __init__(self, scorer: Scorer, images: Tensor) -> None:
        self.scorer, self.images = scorer, images.to(scorer.device)
        self.logits = predict_logits(scorer.classifier, self.images)
        self.results: dict[int, dict[int, ScoreResult]] = {}
        self._variants = list(scorer.variants)

    def scores(self, name: str, rows: NDArray[np.intp]) -> Array:
        """The scores of a row of the result table for these images of the batch, [len(rows)].

        Raises:
            NotFiniteError: one is not a finite number.
        """
        if not len(rows):
            return np.empty(0)
        scores = self._scores(name, rows)
        # The error tells an image by its row in the whole batch.
        of_batch = np.zeros(len(self.images))
        of_batch[rows] = scores
        check_scores(of_batch, f"detector {name}")
        return scores

    def _scores(self, name: str, rows: NDArray[np.intp]) -> Array:
        self._diffuse(self._always_needed(name), rows)
        settings = self.scorer.info.settings_of(name)
        if isinstance(settings, Variant):
            index = self._variants.index(name)
            return np.array([self.results[row][index].score for row in rows.tolist()])
        if isinstance(settings, Baseline):
            indices = torch.from_numpy(rows).to(self.images.device)
            values = detect(self.scorer.baselines[name], self.images[indices], self.logits[indices])
            return np.asarray(values.double().cpu().numpy())
        combined, members = self.scorer.combined[name], dict[str, Array]()
        for member in combined.members:
            scores = np.full(len(rows), np.nan)
            needed = combined.needed(member, members, len(rows))
            scores[needed] = self.scores(member, rows[needed])
            members[member] = scores
        return combined.score(members)

    def reconstruction(self, row: int) -> Tensor | None:
        """Of the first variant that reconstructed this image."""
        for index in range(len(self._variants)):
            result = self.results.get(row, {}).get(index)
            if result is not None and result.reconstruction is not None:
                return result.reconstruction.cpu()
        return None

    def _always_needed(self, name: str) -> list[int]:
        """Indices of the variants that a row needs of every image: all but those behind a gate."""
        settings = self.scorer.info.settings_of(name)
        if isinstance(settings, Variant):
            return [self._variants.index(name)]
        if isinstance(settings, Baseline):
            return []
        members = self.scorer.combined[name].always_needed
        return [index for member in members for index in self._always_needed(member)]

    def _diffuse(self, variants: list[int], rows: NDArray[np.intp]) -> None:
        """Evaluate what is missing of these variants in one pass of the engine, so that they share their work."""
        samples = []
        for row in rows.tolist():
            missing = [index for index in dict.fromkeys(variants) if index not in self.results.get(row, {})]
            if missing:
                samples.append(Sample(row, self.images[row], missing))
        for row, results in self.scorer.diffuse(samples) if samples else ():
            self.results.setdefault(row, {}).update(results)


def _check_deployable(name: str, settings: Any, denoiser: Denoiser | None, image: ImageFormat) -> None:
    if not isinstance(settings, Variant):
        return
    if denoiser is None:
        raise SettingError(f"detector {name}: a variant needs a denoiser")
    channels, side, _ = denoiser.image_shape
    if channels != image.channels or (settings.process_method == "none" and side != image.size):
        raise SettingError(
            f"detector {name}: its images are {image.size} pixels wide, of {image.channels} channels; the denoiser "
            f"takes {side}, of {channels}"
        )
    if settings.needs_fit:
        raise SettingError(
            f"detector {name}: it is not fitted; fit it first (`diffguard.detectors.fitting.fit_variant`)"
        )
    if settings.label != "predicted":
        raise SettingError(
            f"detector {name}: label {settings.label} is told the truth, which nobody knows of new images"
        )
