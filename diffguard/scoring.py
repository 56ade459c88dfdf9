"""Scores of a batch under several variants at once, each network evaluation made once.

Variants of one denoiser share the inversion; variants that ask for the same reconstruction (same
level rule, guidance and label) share that. A sample's score does not depend on what it was scored
beside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

from diffguard.cam import cam_mask
from diffguard.classifiers import Classifier, predict_logits
from diffguard.ddim import GRIDS, Grid
from diffguard.denoisers import Denoiser, in_precision
from diffguard.distances import check_distances, get_distance
from diffguard.errors import DataError, SettingError
from diffguard.guidance import CleanGradient, draw_crops
from diffguard.inversion import Inverted, Similarity, invert, psnr
from diffguard.reconstruction import reconstruct
from diffguard.settings import AdaptiveStop, AllLabels, ClassifierGuidance, LabelGuidance, NoGuidance, Variant
from diffguard.sizing import Sizing


@dataclass(frozen=True)
class Request:
    """One variant of one classifier, to be scored on a batch.

    Attributes:
        label: int64 [B]: labels to guide to, in place of the classifier's predictions; see
            `oracle_labels`.
    """

    classifier: Classifier
    variant: Variant
    label: Tensor | None = None


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


@dataclass(frozen=True)
class Sampler:
    """A denoiser under the settings that variants share: its grid, sizes, clamping and precision."""

    denoiser: Denoiser
    grid: Grid
    sizing: Sizing
    clip: bool
    forback_skip_diff: int
    skip_first_steps: int

    @classmethod
    def of(cls, variant: Variant, denoiser: Denoiser, input_size: int) -> "Sampler":
        """The sampler that a variant describes, for images of this side in pixels."""
        return cls(
            in_precision(denoiser, variant.precision),
            GRIDS[variant.grid](denoiser.alphas_cumprod, variant.levels),
            Sizing(variant.process_method, input_size, denoiser.image_shape[-1]),
            variant.clip,
            variant.forback_skip_diff,
            variant.skip_first_steps,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] at the input size to latents."""
        return self.denoiser.encode(self.sizing.to_model(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images [B, C, H, W] in [0, 1] at the input size."""
        return self.sizing.to_input(self.denoiser.decode(latents)).clamp(0, 1)

    def start(self, level: Tensor) -> Tensor:
        """The index of the first denoising move of samples that stopped at these levels."""
        return self.grid.start(level, self.forback_skip_diff, self.skip_first_steps)

    def invert(
        self,
        latents: Tensor,
        stops: Sequence[int | AdaptiveStop],
        classifier: Classifier,
        label: Tensor,
        scale: float | None = None,
    ) -> list[Inverted]:
        """`invert` under guidance of this scale toward the label, or None: without a label."""
        names = {name for stop in stops if isinstance(stop, AdaptiveStop) for name in stop.thresholds}
        return invert(
            self.denoiser,
            latents,
            self.grid,
            stops,
            clip=self.clip,
            label=None if scale is None else label,
            scale=1.0 if scale is None else scale,
            similarities={name: self.similarity(name, classifier) for name in names},
        )

    def similarity(self, name: str, classifier: Classifier) -> Similarity:
        """How alike latents are: psnr, or 1 - a distance of the images that they are, not clamped."""
        if name == "psnr":
            return lambda x, reference: psnr(self.sizing.crop(x), self.sizing.crop(reference))
        distance = get_distance(name)

        def similar(x: Tensor, reference: Tensor) -> Tensor:
            images, others = (self.sizing.crop(self.denoiser.decode(each)) for each in (x, reference))
            return 1 - distance(images, others, classifier)

        return similar


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

    def run(self, sampler: Sampler) -> None:
        """Make each wanted reconstruction once, no more at a time than the batch has images."""
        pairs = sorted({(sample, label) for wanted in self.wanted for sample, label in wanted.tolist()})
        self.rows = {pair: row for row, pair in enumerate(pairs)}
        device, most = self.inverted.latents.device, len(self.inverted.latents)
        made = []
        for first in range(0, len(pairs), most):
            sample, label = torch.tensor(pairs[first : first + most], device=device).unbind(dim=1)
            start = sampler.start(self.inverted.level[sample])
            latents = reconstruct(
                sampler.denoiser,
                self.inverted.latents[sample],
                start,
                sampler.grid,
                self._noise_label(sampler.denoiser, label),
                scale=self.scale,
                mask=None if self.mask is None else self.mask[sample],
                gradient=self._gradient(sampler, label, int(start.max()) + 1),
                clip=sampler.clip,
            )
            made.append(sampler.decode(latents))
        self.images = torch.cat(made)

    def pick(self, label: Tensor, samples: Tensor | None = None) -> Tensor:
        assert self.images is not None
        samples = torch.arange(len(label)) if samples is None else samples
        return self.images[[self.rows[pair] for pair in zip(samples.tolist(), label.tolist(), strict=True)]]

    def _noise_label(self, denoiser: Denoiser, label: Tensor) -> Tensor:
        """Under classifier guidance the denoiser itself is unconditional."""
        return label if self.guidance is None else torch.full_like(label, denoiser.null_label or 0)

    def _gradient(self, sampler: Sampler, label: Tensor, steps: int) -> CleanGradient | None:
        if self.guidance is None:
            return None
        assert self.classifier is not None
        return clean_gradient(self.guidance, self.classifier, sampler, label, steps)


def clean_gradient(
    guidance: ClassifierGuidance, classifier: Classifier, sampler: Sampler, label: Tensor, steps: int
) -> CleanGradient:
    """The gradient that a guidance asks for, with its cutouts of the first `steps` guided steps."""
    sizing = sampler.sizing
    crops, cutout_size = None, sizing.model_size
    if guidance.cutouts is not None and guidance.cutout_size is not None:
        cutout_size = guidance.cutout_size
        crops = draw_crops(steps, guidance.cutouts, sizing.model_size, cutout_size, guidance.seed)
    return CleanGradient(
        classifier,
        sampler.denoiser.decode,
        label,
        guidance.scale,
        crops,
        cutout_size,
        sizing.input_size,
        guidance.x0_estimate,
    )


@torch.no_grad()
def score_batch(
    images: Tensor, denoiser: Denoiser, requests: Sequence[Request], *, unconditional_for: Tensor | None = None
) -> list[Scored]:
    """Score a batch under every request.

    Args:
        images: [B, C, H, W] in [0, 1], on the denoiser's device; square, of its size or, under a
            variant's process_method, another.
        requests: variants with their thresholds set; those that agree on how to sample share work.
        unconditional_for: bool [B]: samples whose unconditional reconstruction is wanted too.

    Raises:
        DataError: the images are not of the denoiser's shape.
        SettingError: a label of the classifier is unknown to the denoiser, or the images are too
            small for a distance.
    """
    _check(images, denoiser, requests)
    found: dict[int, Scored] = {}
    for shared in _group(range(len(requests)), lambda i: _sampling(requests[i].variant)):
        found |= _score_sharing(images, denoiser, {i: requests[i] for i in shared}, unconditional_for)
    return [found[i] for i in range(len(requests))]


def _sampling(variant: Variant) -> tuple[object, ...]:
    return (
        variant.grid,
        variant.levels,
        variant.clip,
        variant.precision,
        variant.process_method,
        variant.forback_skip_diff,
        variant.skip_first_steps,
    )


def _score_sharing(
    images: Tensor, denoiser: Denoiser, requests: dict[int, Request], unconditional_for: Tensor | None
) -> dict[int, Scored]:
    sampler = Sampler.of(next(iter(requests.values())).variant, denoiser, images.shape[-1])
    denoiser = sampler.denoiser
    predicted = {id(r.classifier): predict_logits(r.classifier, images).argmax(dim=1) for r in requests.values()}
    labels = {i: predicted[id(r.classifier)] if r.label is None else r.label for i, r in requests.items()}
    inverted = _invert_each(sampler, sampler.encode(images), requests, labels)

    jobs: dict[tuple[object, ...], _Job] = {}
    null = torch.full((len(images),), denoiser.null_label or 0, device=images.device)
    picks = torch.zeros(len(images), dtype=torch.bool) if unconditional_for is None else unconditional_for
    pictured = torch.nonzero(picks.to(images.device))[:, 0]

    def plain(index: int) -> _Job:
        return jobs.setdefault((id(inverted[index]),), _Job(inverted[index]))

    def job(index: int) -> _Job:
        request, start, guidance = requests[index], inverted[index], requests[index].variant.guidance
        # The classifier, and the labels that it is asked about.
        own: tuple[object, ...] = (id(start), guidance, id(request.classifier), id(labels[index]))
        if isinstance(guidance, ClassifierGuidance):
            return jobs.setdefault(own, _Job(start, guidance=guidance, classifier=request.classifier))
        if not isinstance(guidance, LabelGuidance) or (guidance.scale == 1 and guidance.cam_cut is None):
            return plain(index)
        if guidance.cam_cut is None:
            return jobs.setdefault((id(start), guidance), _Job(start, scale=guidance.scale))
        if own not in jobs:
            size = start.latents.shape[-2:]
            mask = cam_mask(request.classifier, images, labels[index], guidance.cam_cut, (size[0], size[1]))
            jobs[own] = _Job(start, scale=guidance.scale, mask=mask)
        return jobs[own]

    for index, request in requests.items():
        for label in _labels(request, labels[index], null, denoiser):
            job(index).want(label)
        if request.variant.against == "unconditional":
            plain(index).want(null)
        elif len(pictured):
            plain(index).want(null[pictured], pictured)
    for work in jobs.values():
        work.run(sampler)

    found = {}
    for index, request in requests.items():
        variant, label = request.variant, labels[index]
        reference, without = images, None
        if variant.against == "unconditional":
            reference = without = plain(index).pick(null)
        elif len(pictured):
            without = torch.zeros_like(images)
            without[pictured] = plain(index).pick(null[pictured], pictured)
        distance = get_distance(variant.distance)
        made = [job(index).pick(each) for each in _labels(request, label, null, denoiser)]
        scores = torch.stack([distance(reference, each, request.classifier) for each in made])
        score, nearest = scores.min(dim=0)
        chosen = torch.stack(made)[nearest, torch.arange(len(images), device=images.device)]
        prediction = predicted[id(request.classifier)]
        found[index] = Scored(score, prediction, inverted[index].level, chosen, without)
    return found


def _invert_each(
    sampler: Sampler, latents: Tensor, requests: dict[int, Request], labels: dict[int, Tensor]
) -> dict[int, Inverted]:
    """Each request's inversion; those under the same label, or none, and classifier walk up together."""
    found: dict[int, Inverted] = {}

    def together(index: int) -> tuple[object, ...]:
        variant, classifier = requests[index].variant, id(requests[index].classifier)
        label = None if variant.inversion_scale is None else (variant.inversion_scale, id(labels[index]))
        stop = variant.stop
        # Similarities may look through the classifier.
        sees = isinstance(stop, AdaptiveStop) and set(stop.thresholds) != {"psnr"}
        return label, classifier if sees else None

    for shared in _group(list(requests), together):
        first = requests[shared[0]]
        stops = list(dict.fromkeys(_hashable(requests[index].variant.stop) for index in shared))
        by_key = {_hashable(requests[index].variant.stop): requests[index].variant.stop for index in shared}
        rules = [by_key[key] for key in stops]
        ends = sampler.invert(latents, rules, first.classifier, labels[shared[0]], first.variant.inversion_scale)
        where = dict(zip(stops, ends, strict=True))
        found |= {index: where[_hashable(requests[index].variant.stop)] for index in shared}
    return found


def _hashable(stop: int | AdaptiveStop) -> str:
    return str(stop) if isinstance(stop, int) else stop.model_dump_json()


def _labels(request: Request, predicted: Tensor, null: Tensor, denoiser: Denoiser) -> list[Tensor]:
    """The labels to reconstruct under; more than one where the nearest is to count."""
    guidance = request.variant.guidance
    if isinstance(guidance, AllLabels):
        return [torch.full_like(predicted, each) for each in range(denoiser.num_labels)]
    return [null if isinstance(guidance, NoGuidance) else predicted]


def oracle_labels(
    kind: str, predicted: Tensor, true_label: Tensor, num_classes: int, keys: Sequence[str], seed: int = 0
) -> Tensor:
    """The labels that a variant's ``label`` setting guides to.

    Args:
        kind: "predicted", "oracle" or "oracle-ind"; see `Variant`.
        predicted: int64 [B]. true_label: int64 [B], negative for OOD images.
        keys: one string an image, its content hash: the random label of an OOD image depends on it
            and the seed alone.

    Returns:
        int64 [B].
    """
    if kind == "predicted":
        return predicted
    known = true_label >= 0
    if kind == "oracle-ind":
        return torch.where(known, true_label, predicted)
    drawn = [int(sha256(f"{seed}:{key}".encode()).hexdigest(), 16) % num_classes for key in keys]
    return torch.where(known, true_label, torch.tensor(drawn, device=predicted.device))


def fit_variant(variant: Variant, denoiser: Denoiser, classifier: Classifier, images: Tensor) -> Variant:
    """Set what a variant takes from InD calibration images: the thresholds of an adaptive stop.

    Each null threshold becomes the median over the images of its similarity at level ``median_at``.

    Args:
        images: [N, C, H, W] in [0, 1].
    """
    stop = variant.stop
    if not isinstance(stop, AdaptiveStop) or stop.median_at is None:
        return variant
    sampler = Sampler.of(variant, denoiser, images.shape[-1])
    latents = sampler.encode(images)
    label = predict_logits(classifier, images).argmax(dim=1)
    [there] = sampler.invert(latents, [stop.median_at], classifier, label, variant.inversion_scale)
    thresholds = {
        name: float(sampler.similarity(name, classifier)(there.latents, latents).median()) if value is None else value
        for name, value in stop.thresholds.items()
    }
    fitted = stop.model_copy(update={"thresholds": thresholds, "median_at": None})
    return variant.model_copy(update={"stop": fitted})


def _check(images: Tensor, denoiser: Denoiser, requests: Sequence[Request]) -> None:
    channels, side, _ = denoiser.image_shape
    if images.ndim != 4 or images.shape[1] != channels or images.shape[2] != images.shape[3]:
        raise DataError(
            f"images are {tuple(images.shape)}, the denoiser takes square ones [B, {channels}, {side}, {side}]"
        )
    for request in requests:
        variant = request.variant
        check_distances(variant.distances, images.shape[-1])
        if isinstance(variant.guidance, LabelGuidance | AllLabels) and not denoiser.num_labels:
            raise SettingError(
                f"guidance: {variant.guidance.kind} needs a class-conditional denoiser; "
                "this one takes no labels (use kind: classifier)"
            )
        asked = isinstance(variant.guidance, LabelGuidance) or variant.inversion_scale is not None
        if asked and request.classifier.num_classes > denoiser.num_labels:
            raise SettingError(
                f"the classifier has {request.classifier.num_classes} classes, the denoiser {denoiser.num_labels}"
            )


def _group(items: Sequence[int], key: Callable[[int], object]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
