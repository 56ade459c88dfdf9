"""Scores of a batch under several variants at once, each network evaluation made once.

Variants of one denoiser share the inversion; variants that ask for the same reconstruction (same
level rule, guidance and label) share that. A sample's score does not depend on what it was scored
beside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffguard.cam import cam_mask
from diffguard.classifiers import Classifier, predict_logits
from diffguard.ddim import Grid, even_grid
from diffguard.denoisers import Denoiser
from diffguard.distances import get_distance
from diffguard.errors import DataError, SettingError
from diffguard.guidance import CleanGradient, draw_crops
from diffguard.inversion import Inverted, calibrate_stop, invert
from diffguard.reconstruction import reconstruct
from diffguard.settings import AdaptiveStop, AllLabels, ClassifierGuidance, LabelGuidance, NoGuidance, Variant


@dataclass(frozen=True)
class Request:
    """One variant of one classifier, to be scored on a batch."""

    classifier: Classifier
    variant: Variant


@dataclass(frozen=True)
class Scored:
    """What one request found.

    Attributes:
        score: float [B], higher = more OOD.
        label: int64 [B], the classifier's prediction.
        level: int64 [B], the noise level at which the inversion stopped: its number of steps.
        reconstruction: [B, C, H, W] in [0, 1], under the label that decided the score.
        unconditional: [B, C, H, W] in [0, 1], from the same noise without a label; None if no one
            asked for it.
    """

    score: Tensor
    label: Tensor
    level: Tensor
    reconstruction: Tensor
    unconditional: Tensor | None


@dataclass
class _Job:
    """Reconstructions of one kind: the (sample, label) pairs wanted, then the images made of them."""

    inverted: Inverted
    scale: float = 1.0
    mask: Tensor | None = None
    guidance: ClassifierGuidance | None = None
    classifier: Classifier | None = None
    wanted: list[Tensor] = field(default_factory=list)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    images: Tensor | None = None

    def want(self, label: Tensor, samples: Tensor | None = None) -> None:
        samples = torch.arange(len(label), device=label.device) if samples is None else samples
        self.wanted.append(torch.stack([samples, label], dim=1))

    def run(self, denoiser: Denoiser, grid: Grid, *, clip: bool) -> None:
        """Make each wanted reconstruction once, no more at a time than the batch has images."""
        pairs = sorted({(sample, label) for wanted in self.wanted for sample, label in wanted.tolist()})
        self.rows = {pair: row for row, pair in enumerate(pairs)}
        device, most = self.inverted.latents.device, len(self.inverted.latents)
        made = []
        for start in range(0, len(pairs), most):
            sample, label = torch.tensor(pairs[start : start + most], device=device).unbind(dim=1)
            level = self.inverted.level[sample]
            latents = reconstruct(
                denoiser,
                self.inverted.latents[sample],
                level,
                grid,
                self._noise_label(denoiser, label),
                scale=self.scale,
                mask=None if self.mask is None else self.mask[sample],
                gradient=self._gradient(denoiser, label, int(level.max())),
                clip=clip,
            )
            made.append(denoiser.decode(latents).clamp(0, 1))
        self.images = torch.cat(made)

    def pick(self, label: Tensor, samples: Tensor | None = None) -> Tensor:
        assert self.images is not None
        samples = torch.arange(len(label)) if samples is None else samples
        return self.images[[self.rows[pair] for pair in zip(samples.tolist(), label.tolist(), strict=True)]]

    def _noise_label(self, denoiser: Denoiser, label: Tensor) -> Tensor:
        return label if self.guidance is None else torch.full_like(label, denoiser.null_label or 0)

    def _gradient(self, denoiser: Denoiser, label: Tensor, steps: int) -> CleanGradient | None:
        if self.guidance is None:
            return None
        assert self.classifier is not None
        side = denoiser.image_shape[-1]
        crops = draw_crops(steps, self.guidance.cutouts, side, self.guidance.cutout_size, self.guidance.seed)
        return CleanGradient(
            self.classifier, denoiser.decode, label, self.guidance.scale, self.guidance.cutout_size, crops
        )


@torch.no_grad()
def score_batch(
    images: Tensor, denoiser: Denoiser, requests: Sequence[Request], *, unconditional_for: Tensor | None = None
) -> list[Scored]:
    """Score a batch under every request.

    Args:
        images: [B, C, H, W] in [0, 1], of the denoiser's image size, on its device.
        requests: variants with their thresholds set; they must agree on levels, clip and precision
            only where they are to share work.
        unconditional_for: bool [B]: samples whose unconditional reconstruction is wanted too.

    Raises:
        DataError: the images are not of the denoiser's shape.
        SettingError: a label of the classifier is unknown to the denoiser.
    """
    _check(images, denoiser, requests)
    found: dict[int, Scored] = {}
    for shared in _group(range(len(requests)), lambda i: _sampling(requests[i].variant)):
        found |= _score_sharing(images, denoiser, {i: requests[i] for i in shared}, unconditional_for)
    return [found[i] for i in range(len(requests))]


def _sampling(variant: Variant) -> tuple[int, bool, str]:
    return variant.levels, variant.clip, variant.precision


def _score_sharing(
    images: Tensor, denoiser: Denoiser, requests: dict[int, Request], unconditional_for: Tensor | None
) -> dict[int, Scored]:
    levels, clip, _ = _sampling(next(iter(requests.values())).variant)
    grid = even_grid(denoiser.alphas_cumprod, levels)
    stops = list(dict.fromkeys(request.variant.stop for request in requests.values()))
    inverted = dict(zip(stops, invert(denoiser, denoiser.encode(images), grid, stops, clip=clip), strict=True))
    labels = {id(r.classifier): predict_logits(r.classifier, images).argmax(dim=1) for r in requests.values()}

    jobs: dict[tuple[object, ...], _Job] = {}
    null = torch.full((len(images),), denoiser.null_label or 0, device=images.device)
    picks = torch.zeros(len(images), dtype=torch.bool) if unconditional_for is None else unconditional_for
    pictured = torch.nonzero(picks.to(images.device))[:, 0]

    def plain(stop: int | AdaptiveStop) -> _Job:
        return jobs.setdefault((stop,), _Job(inverted[stop]))

    def job(request: Request) -> _Job:
        stop, guidance = request.variant.stop, request.variant.guidance
        if isinstance(guidance, ClassifierGuidance):
            own: tuple[object, ...] = (stop, guidance, id(request.classifier))
            return jobs.setdefault(own, _Job(inverted[stop], guidance=guidance, classifier=request.classifier))
        if not isinstance(guidance, LabelGuidance) or (guidance.scale == 1 and guidance.cam_cut is None):
            return plain(stop)
        if guidance.cam_cut is None:
            return jobs.setdefault((stop, guidance), _Job(inverted[stop], scale=guidance.scale))
        own = (stop, guidance, id(request.classifier))
        if own not in jobs:
            label, size = labels[id(request.classifier)], inverted[stop].latents.shape[-2:]
            mask = cam_mask(request.classifier, images, label, guidance.cam_cut, (size[0], size[1]))
            jobs[own] = _Job(inverted[stop], scale=guidance.scale, mask=mask)
        return jobs[own]

    for request in requests.values():
        for label in _labels(request, labels[id(request.classifier)], null, denoiser):
            job(request).want(label)
        if request.variant.against == "unconditional":
            plain(request.variant.stop).want(null)
        elif len(pictured):
            plain(request.variant.stop).want(null[pictured], pictured)
    for work in jobs.values():
        work.run(denoiser, grid, clip=clip)

    found = {}
    for index, request in requests.items():
        variant, label = request.variant, labels[id(request.classifier)]
        reference, without = images, None
        if variant.against == "unconditional":
            reference = without = plain(variant.stop).pick(null)
        elif len(pictured):
            without = torch.zeros_like(images)
            without[pictured] = plain(variant.stop).pick(null[pictured], pictured)
        distance = get_distance(variant.distance)
        made = [job(request).pick(each) for each in _labels(request, label, null, denoiser)]
        scores = torch.stack([distance(reference, each, request.classifier) for each in made])
        score, nearest = scores.min(dim=0)
        chosen = torch.stack(made)[nearest, torch.arange(len(images), device=images.device)]
        found[index] = Scored(score, label, inverted[variant.stop].level, chosen, without)
    return found


def _labels(request: Request, predicted: Tensor, null: Tensor, denoiser: Denoiser) -> list[Tensor]:
    """The labels to reconstruct under; more than one where the nearest is to count."""
    if isinstance(request.variant.guidance, AllLabels):
        return [torch.full_like(predicted, each) for each in range(denoiser.num_labels)]
    return [null if isinstance(request.variant.guidance, NoGuidance) else predicted]


def fit_variant(variant: Variant, denoiser: Denoiser, images: Tensor) -> Variant:
    """Set what a variant takes from InD calibration images: the threshold of an adaptive stop.

    Args:
        images: [N, C, H, W] in [0, 1].
    """
    if not (variant.needs_fit and isinstance(variant.stop, AdaptiveStop)):
        return variant
    grid = even_grid(denoiser.alphas_cumprod, variant.levels)
    stop = calibrate_stop(denoiser, denoiser.encode(images), grid, variant.stop, clip=variant.clip)
    return variant.model_copy(update={"stop": stop})


def _check(images: Tensor, denoiser: Denoiser, requests: Sequence[Request]) -> None:
    if tuple(images.shape[1:]) != denoiser.image_shape:
        raise DataError(f"images are {tuple(images.shape[1:])}, the denoiser takes {denoiser.image_shape}")
    for request in requests:
        if request.variant.uses_classifier and request.classifier.num_classes > denoiser.num_labels:
            raise SettingError(
                f"the classifier has {request.classifier.num_classes} classes, the denoiser {denoiser.num_labels}"
            )


def _group(items: Sequence[int], key: Callable[[int], object]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
