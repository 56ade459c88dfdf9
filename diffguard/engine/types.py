"""What the engine takes and gives: requests and samples in, score results out, and what it cost."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffguard.diffusion.activations import find_block
from diffguard.diffusion.early_stop import check_thresholds_set
from diffguard.diffusion.schedules import SCHEDULES
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import ACTIVATIONS, LABEL_GAIN, POSTERIOR, AllLabels, LabelGuidance, Variant
from diffguard.utils.precision import resolve_precision


@dataclass(frozen=True)
class Request:
    """A variant with its thresholds set, and the classifier that it guards."""

    classifier: Classifier
    variant: Variant


@dataclass(frozen=True)
class Sample:
    """One image to score.

    Attributes:
        key: comes back with the results.
        image: [C, H, W] in [0, 1]; square, of the denoiser's size or, under a variant's
            process_method, another; the same for all.
        wanted: the requests to answer, by index; None: all.
        labels: by request, labels to guide to in place of the classifier's prediction.
        unconditional: the reconstruction without a label is wanted too.
    """

    key: Hashable
    image: Tensor
    wanted: Sequence[int] | None = None
    labels: Mapping[int, int] = field(default_factory=dict)
    unconditional: bool = False


@dataclass(frozen=True)
class ScoreResult:
    """What one request says of one image.

    Attributes:
        score: higher = more OOD; NaN where the classifier's logits are not all finite.
        label: the classifier's prediction.
        level: the noise level at which the inversion stopped: its number of steps.
        reconstruction: [C, H, W] in [0, 1], under the label that decided the score; None if the variant
            makes none, or of images that were not kept.
        unconditional: [C, H, W] in [0, 1], from the same noise without a label; None if neither the
            sample nor the variant asked for it.
        path: the statistics of the inversion path (`diffguard.diffusion.path_statistics`), of a variant that
            scores them.
        denoiser_label: the label that the denoiser, as a classifier, gives the image; None: it was not asked.
    """

    score: float
    label: int
    level: int
    reconstruction: Tensor | None
    unconditional: Tensor | None
    path: tuple[float, ...] | None = None
    denoiser_label: int | None = None

    def without_images(self) -> "ScoreResult":
        """The same figures; what is kept of many images."""
        return replace(self, reconstruction=None, unconditional=None)


@dataclass
class Stats:
    """What a run has cost.

    Attributes:
        calls: of the denoiser's network.
        evaluations: of (latents, timestep, label) in these calls; one image may have several in a call.
        capacity: evaluations that the calls could have held.
        gradients: latents at which a gradient of classifier guidance was taken.
    """

    calls: int = 0
    evaluations: int = 0
    capacity: int = 0
    gradients: int = 0

    def add(self, other: "Stats") -> None:
        """Add what another run has cost."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def since(self, before: "Stats") -> "Stats":
        """What has been added since an earlier state."""
        return Stats(**{name: value - getattr(before, name) for name, value in vars(self).items()})

    @property
    def occupancy(self) -> float:
        """Share of the batches' capacity that was used."""
        return self.evaluations / max(self.capacity, 1)


def check_request(request: Request, denoiser: Denoiser) -> None:
    """Check that a variant suits the denoiser and its classifier.

    Raises:
        SettingError: it needs labels or levels that the denoiser does not know, or was not fitted.
    """
    variant = request.variant
    if isinstance(variant.guidance, LabelGuidance | AllLabels) and not denoiser.num_labels:
        raise SettingError(
            f"guidance: {variant.guidance.kind} needs a class-conditional denoiser; "
            "this one takes no labels (use kind: classifier)"
        )
    looks_it_up = isinstance(variant.guidance, LabelGuidance) or variant.distance == POSTERIOR
    is_told_labels = looks_it_up or variant.inversion_scale is not None
    if is_told_labels and request.classifier.num_classes > denoiser.num_labels:
        raise SettingError(
            f"the classifier has {request.classifier.num_classes} classes, the denoiser {denoiser.num_labels}"
        )
    check_thresholds_set(variant.stop)
    levels = SCHEDULES[variant.grid](denoiser.alphas_cumprod, variant.levels).levels
    if variant.max_level > levels:
        raise SettingError(f"stop: level {variant.max_level} is above the {levels} of this denoiser's grid; lower it")
    if variant.needs_train:
        raise SettingError(f"distance {variant.distance}: not fitted yet; call fit() with images first")
    if variant.distance == LABEL_GAIN and denoiser.null_label is None:
        raise SettingError(f"distance {LABEL_GAIN}: it compares with no label, and this denoiser always takes one")
    if variant.distance == POSTERIOR and denoiser.num_labels < 2:
        raise SettingError(f"distance {POSTERIOR}: it compares labels, and this denoiser has {denoiser.num_labels}")
    if variant.distance == ACTIVATIONS:
        find_block(denoiser, variant.activation_gaussian.block)


def resolved_request(request: Request, device: torch.device) -> Request:
    """The request with a variant whose precision is the one that ``auto`` means on this device."""
    precision = resolve_precision(request.variant.precision, device)
    return replace(request, variant=request.variant.model_copy(update={"precision": precision}))
