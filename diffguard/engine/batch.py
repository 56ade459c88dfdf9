"""Scores of one batch of images under several requests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.engine.engine import Engine
from diffguard.engine.types import Request, Sample
from diffguard.models.denoisers.base import Denoiser
from diffguard.utils.finite import check_scores


@dataclass(frozen=True)
class Scored:
    """The results of one request for a batch.

    Attributes:
        score: float [B], higher = more OOD.
        label: int64 [B], predicted by the classifier.
        level: int64 [B], the noise level at which the inversion stopped, which is its number of steps.
        reconstruction: [B, C, H, W] in [0, 1], under the label of the score; None if the variant makes none.
        unconditional: [B, C, H, W] in [0, 1], from the same noise without a label; None if not requested.
        path: float64 [B, 6], statistics of the inversion path; None if the variant does not score them.
    """

    score: Tensor
    label: Tensor
    level: Tensor
    reconstruction: Tensor | None
    unconditional: Tensor | None
    path: Tensor | None = None


def score_batch(
    images: Tensor,
    denoiser: Denoiser,
    requests: Sequence[Request],
    *,
    labels: dict[int, Tensor] | None = None,
    unconditional: bool = False,
) -> list[Scored]:
    """Score a batch under every request, by an `Engine` with as many slots.

    Args:
        images: [B, C, H, W] in [0, 1]; see `Sample.image`.
        labels: by index of the request, int64 [B]: labels to guide to instead of the classifier's predictions.
        unconditional: whether every request also returns reconstructions without a label.

    Returns:
        The results of each request.

    Raises:
        DataError: the images do not have the denoiser's shape.
        NotFiniteError: a score is NaN or infinite.
        SettingError: a variant does not suit the denoiser, or the images are too small for a distance.
    """
    samples = []
    for row, image in enumerate(images):
        labels_of_image = {index: int(values[row]) for index, values in (labels or {}).items()}
        samples.append(Sample(row, image, labels=labels_of_image, unconditional=unconditional))
    engine = Engine(denoiser, requests, slots=max(1, len(images)))
    by_row = dict(engine.run(samples))
    scored = []
    for index, request in enumerate(requests):
        results = [by_row[row][index] for row in range(len(images))]
        check_scores([result.score for result in results], f"distance {request.variant.distance}")
        paths = [result.path for result in results if result.path is not None]
        scored.append(
            Scored(
                score=torch.tensor([result.score for result in results], device=denoiser.device),
                label=torch.tensor([result.label for result in results], device=denoiser.device),
                level=torch.tensor([result.level for result in results]),
                reconstruction=_stacked(result.reconstruction for result in results),
                unconditional=_stacked(result.unconditional for result in results),
                path=torch.tensor(paths, dtype=torch.float64) if paths else None,
            )
        )
    return scored


def _stacked(images: Iterable[Tensor | None]) -> Tensor | None:
    """Images [C, H, W] as a batch; None if there are none."""
    present = [image for image in images if image is not None]
    return torch.stack(present) if present else None
