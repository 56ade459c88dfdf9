"""Scores of a batch, labels of the oracle settings, and what a variant takes from images before it scores."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain

import torch
from torch import Tensor

from diffguard.classifiers import Classifier, predict_logits
from diffguard.denoisers import Denoiser
from diffguard.engine import Engine, Request, Sample
from diffguard.memory import Portions
from diffguard.path import fit_path
from diffguard.sampling import Sampler
from diffguard.settings import STANDARD_PATH, AdaptiveStop, Variant
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


def oracle_label(kind: str, true_label: int, num_classes: int, key: str, seed: int = 0) -> int | None:
    """The label that a variant's ``label`` setting guides to; None: the classifier's prediction.

    Args:
        kind: "predicted", "oracle" or "oracle-ind"; see `Variant`.
        true_label: negative for OOD images.
        key: of the image, its content hash: the random label of an OOD image depends on it and the
            seed alone.
    """
    if kind == "predicted" or (kind == "oracle-ind" and true_label < 0):
        return None
    if true_label >= 0:
        return true_label
    return int(sha256(f"{seed}:{key}".encode()).hexdigest(), 16) % num_classes


def fit_variant(
    variant: Variant,
    denoiser: Denoiser,
    classifier: Classifier,
    batches: Iterable[Tensor],
    train: Iterable[Tensor] = (),
    *,
    slots: int = 256,
) -> Variant:
    """Set what a variant takes from InD images: the thresholds of an adaptive stop, the Gaussian of a path.

    Each null threshold becomes the median over the calibration images of its similarity at level
    ``median_at``.

    Args:
        batches: of calibration images, [B, C, H, W] in [0, 1].
        train: of other InD images, likewise, that no score's threshold comes from: a path's Gaussian
            is fitted on them.
        slots: the most images in a network call; half as many whenever memory ends.

    Raises:
        SettingError: there are too few of these.
    """
    stopping = _fit_stop(variant, denoiser, classifier, batches, slots)
    if not stopping.needs_train:
        return stopping
    unfitted = Request(classifier, stopping.model_copy(update={"path": STANDARD_PATH}))
    engine = Engine(denoiser, [unfitted], slots=slots)
    found = dict(engine.run(Sample(row, image) for row, image in enumerate(chain.from_iterable(train))))
    paths = torch.tensor([found[row][0].path for row in range(len(found))], dtype=torch.float64)
    return stopping.model_copy(update={"path": fit_path(paths.view(-1, 6))})


def _fit_stop(
    variant: Variant, denoiser: Denoiser, classifier: Classifier, batches: Iterable[Tensor], slots: int
) -> Variant:
    stop = variant.stop
    if not isinstance(stop, AdaptiveStop) or stop.median_at is None:
        return variant
    level = stop.median_at
    seen: dict[str, list[Tensor]] = {name: [] for name, value in stop.thresholds.items() if value is None}

    def look(images: list[Tensor]) -> None:
        part = torch.stack(images).to(denoiser.device)
        sampler = Sampler.of(variant, denoiser, part.shape[-1])
        latents = sampler.encode(part)
        label = predict_logits(classifier, part).argmax(dim=1)
        [there] = sampler.invert(latents, [level], classifier, label, variant.inversion_scale)
        found = {name: sampler.similarity(name, classifier)(there.latents, latents) for name in seen}
        for name, values in found.items():
            seen[name].append(values)

    portions = Portions(slots, denoiser.device)
    for images in batches:
        portions.each(look, list(images))
    for name, parts in seen.items():
        check_scores(torch.cat(parts).cpu().numpy(), f"stop.thresholds.{name}")
    thresholds = {**stop.thresholds, **{name: float(torch.cat(parts).median()) for name, parts in seen.items()}}
    fitted = stop.model_copy(update={"thresholds": thresholds, "median_at": None})
    return variant.model_copy(update={"stop": fitted})
