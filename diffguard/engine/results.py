"""Score results of finished images: their reconstructions decoded, and how far these are from the input."""

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from diffguard.diffusion.activations import activation_score
from diffguard.diffusion.denoising_errors import label_gain, posterior_odds
from diffguard.diffusion.path_statistics import path_score
from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import get_distance
from diffguard.engine.plan import Plan, ReconstructionKey
from diffguard.engine.pool import LatentPool
from diffguard.engine.trajectory import ImageState
from diffguard.engine.types import ScoreResult
from diffguard.settings import ACTIVATIONS, LABEL_GAIN, PATH
from diffguard.utils.known import known
from diffguard.utils.memory import MemorySafeBatches

Decoded = dict[tuple[int, ReconstructionKey], Tensor]
"""Reconstructions [C, H, W] in [0, 1], by the row of their image and their key."""


class Results:
    """Turns finished images into score results, and releases their latents."""

    def __init__(self, plan: Plan, samplers: list[Sampler], pool: LatentPool, batches: MemorySafeBatches) -> None:
        self._plan, self._samplers, self._pool, self._batches = plan, samplers, pool, batches

    def collect(self, images: list[ImageState]) -> list[tuple[Hashable, dict[int, ScoreResult]]]:
        """The results of each image by request, with the image's key."""
        collected: list[tuple[Hashable, dict[int, ScoreResult]]] = []
        self._batches.run(lambda part: collected.extend(self._score(part)), images)
        return collected

    def _score(self, images: list[ImageState]) -> list[tuple[Hashable, dict[int, ScoreResult]]]:
        decoded = self._decode(images)
        by_row: list[dict[int, ScoreResult]] = [{} for _ in images]
        for request in range(len(self._plan.requests)):
            rows = [row for row, image in enumerate(images) if request in image.stopped_at]
            if not rows:
                continue
            if self._plan.requests[request].variant.reconstructs:
                results = self._of_reconstructions(request, images, rows, decoded)
            else:
                of = {PATH: self._of_paths, ACTIVATIONS: self._of_activations}
                score = of.get(self._plan.requests[request].variant.distance, self._of_errors)
                results = score(request, [images[row] for row in rows])
            for row, result in zip(rows, results, strict=True):
                by_row[row][request] = result
        for image in images:
            for index in image.ends.values():
                self._pool.release(index)
        return [(image.sample.key, results) for image, results in zip(images, by_row, strict=True)]

    def _of_reconstructions(
        self, request: int, images: Sequence[ImageState], rows: list[int], decoded: Decoded
    ) -> list[ScoreResult]:
        """The results of a request: the distance of each image's nearest reconstruction."""
        variant, classifier = self._plan.requests[request].variant, self._plan.requests[request].classifier
        distance = get_distance(variant.distance)
        keys = [(row, key) for row in rows for key in images[row].reconstructions[request].conditional]
        unconditional = {}
        for row in rows:
            key = images[row].reconstructions[request].unconditional
            unconditional[row] = None if key is None else decoded[row, key]
        references = [
            unconditional[row] if variant.against == "unconditional" else images[row].pixels for row, _ in keys
        ]
        distances = distance(
            torch.stack([known(reference) for reference in references]),
            torch.stack([decoded[key] for key in keys]),
            classifier,
        )
        # Every image has the same number of reconstructions here.
        scores, nearest = distances.view(len(rows), -1).min(dim=1)
        if variant.against == "gain":
            pixels = torch.stack([images[row].pixels for row in rows])
            scores = scores - distance(pixels, torch.stack([known(unconditional[row]) for row in rows]), classifier)
        results = []
        for row, score, index in zip(rows, scores.tolist(), nearest.tolist(), strict=True):
            key = images[row].reconstructions[request].conditional[index]
            results.append(self._result(request, images[row], score, decoded[row, key], unconditional[row]))
        return results

    def _of_paths(self, request: int, images: Sequence[ImageState]) -> list[ScoreResult]:
        """The results of a request that scores inversion paths."""
        density = self._plan.requests[request].variant.path
        assert density is not None  # `check_request`
        paths = [image.paths[request] for image in images]
        scores = path_score(density, torch.tensor(paths, dtype=torch.float64)).tolist()
        return [
            self._result(request, image, score, path=path)
            for image, score, path in zip(images, scores, paths, strict=True)
        ]

    def _of_activations(self, request: int, images: Sequence[ImageState]) -> list[ScoreResult]:
        """The results of a request that scores the denoiser's activations."""
        gaussian = self._plan.requests[request].variant.activation_gaussian
        scores = activation_score(gaussian, torch.stack([image.activations[request] for image in images]))
        return [self._result(request, image, score) for image, score in zip(images, scores.tolist(), strict=True)]

    def _of_errors(self, request: int, images: Sequence[ImageState]) -> list[ScoreResult]:
        """The results of a request that compares denoising errors."""
        noisy_images = self._plan.noisy_images[request]
        weights = torch.tensor([weight for _, weight in noisy_images], dtype=torch.float64)
        results = []
        for image in images:
            labels = image.comparisons[request].labels
            errors = torch.tensor([[image.errors[key, label] for key, _ in noisy_images] for label in labels])
            denoiser_label = None
            if self._plan.requests[request].variant.distance == LABEL_GAIN:
                score = label_gain(errors[0], errors[1], weights)
            else:
                score = posterior_odds(errors[None], torch.tensor([0]), weights, self._pool.elements)
                denoiser_label = labels[int((errors.double() * weights).sum(dim=1).argmin())]
            results.append(self._result(request, image, float(score), denoiser_label=denoiser_label))
        return results

    def _result(
        self,
        request: int,
        image: ImageState,
        score: float,
        reconstruction: Tensor | None = None,
        unconditional: Tensor | None = None,
        path: tuple[float, ...] | None = None,
        denoiser_label: int | None = None,
    ) -> ScoreResult:
        classifier = self._plan.classifier_of[request]
        # Without finite logits there is no prediction, and nothing that was guided by it is a score.
        score = score if image.is_finite[classifier] else math.nan
        label, level = image.predicted[classifier], image.stopped_at[request]
        return ScoreResult(score, label, level, reconstruction, unconditional, path, denoiser_label)

    def _decode(self, images: Sequence[ImageState]) -> Decoded:
        """Every reconstruction of these images, a batch of latents at a time."""
        by_sampler: dict[int, list[tuple[int, ReconstructionKey]]] = {}
        for row, image in enumerate(images):
            for key in image.ends:
                by_sampler.setdefault(key.sampler, []).append((row, key))
        decoded: Decoded = {}
        size = self._batches.size
        for sampler, keys in by_sampler.items():
            for part in (keys[first : first + size] for first in range(0, len(keys), size)):
                indices = [images[row].ends[key] for row, key in part]
                latents = self._pool.get([known(index) for index in indices])
                decoded |= dict(zip(part, self._samplers[sampler].decode(latents), strict=True))
        return decoded
