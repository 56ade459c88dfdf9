"""Scores of one batch under several requests."""

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
    """What one request found of a batch.

    Attributes:
        score: float [B], higher = more OOD.
        label: int64 [B], the classifier's prediction.
        level: int64 [B], the noise level at which the inversion stopped: its number of steps.
        reconstruction: [B, C, H, W] in [0, 1], under the label that decided the score; None if the
            variant makes none.
        unconditional: [B, C, H, W] in [0, 1], from the same noise without a label; None if no one
            asked for it.
        path: float64 [B, 6], the statistics of the inversion path, of a variant that scores them.
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
        labels: by request, int64 [B]: labels to guide to in place of the classifier's predictions.
        unconditional: reconstructions without a label are wanted from every request.

    Raises:
        DataError: the images are not of the denoiser's shape. NotFiniteError: a score is not a finite number.
        SettingError: a variant does not suit the denoiser, or the images are too small for a distance.
    """
    given = labels or {}
    samples = (
        Sample(row, image, labels={i: int(each[row]) for i, each in given.items()}, unconditional=unconditional)
        for row, image in enumerate(images)
    )
    engine = Engine(denoiser, requests, slots=max(1, len(images)))
    by_row = dict(engine.run(samples))
    found = []
    for index, request in enumerate(requests):
        mine = [by_row[row][index] for row in range(len(images))]
        check_scores([each.score for each in mine], f"distance {request.variant.distance}")
        paths = [each.path for each in mine if each.path is not None]
        found.append(
            Scored(
                torch.tensor([each.score for each in mine], device=denoiser.device),
                torch.tensor([each.label for each in mine], device=denoiser.device),
                torch.tensor([each.level for each in mine]),
                _stacked([each.reconstruction for each in mine]),
                _stacked([each.unconditional for each in mine]),
                torch.tensor(paths, dtype=torch.float64) if paths else None,
            )
        )
    return found


def _stacked(pictures: Iterable[Tensor | None]) -> Tensor | None:
    made = [each for each in pictures if each is not None]
    return torch.stack(made) if made else None
