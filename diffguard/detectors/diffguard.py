"""DiffGuard as a detector of pytorch-ood: fit, predict; and the verdict on one image with its reasons."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from pytorch_ood.api import Detector, DetectorInfo, Paper, RequiresFittingException, Task
from torch import Tensor

from diffguard.calibration.conformal import accept_threshold
from diffguard.detectors.fitting import fit_variant
from diffguard.engine import Request, Scored, score_batch
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import DEFAULT_VARIANT, Variant


class DiffGuard(Detector):  # type: ignore[misc]
    """OOD detection by semantic mismatch with a diffusion model (arXiv 2308.07687).

    Args:
        classifier: the model under protection; images [B, C, H, W] in [0, 1] in, logits out.
        denoiser: a diffusion model that knows the classifier's labels.
        variant: how to invert, guide and compare.

    Example:
        >>> detector = DiffGuard(classifier, denoiser)  # doctest: +SKIP
        >>> detector.fit(calibration_loader)  # doctest: +SKIP
        >>> detector.predict(images) > detector.threshold  # doctest: +SKIP
    """

    requires_fit = False
    info = DetectorInfo(
        paper=Paper(
            title="DiffGuard: Semantic Mismatch-Guided Out-of-Distribution Detection "
            "using Pre-trained Diffusion Models",
            venue="ICCV",
            year=2023,
            url="https://arxiv.org/abs/2308.07687",
            code="https://github.com/cure-lab/DiffGuard",
        ),
        tasks=frozenset({Task.CLASSIFICATION}),
    )

    def __init__(self, classifier: Classifier, denoiser: Denoiser, variant: Variant = DEFAULT_VARIANT) -> None:
        self.classifier = classifier
        self.denoiser = denoiser
        self.variant = variant
        self.threshold: float | None = None

    def fit(
        self,
        data_loader: Iterable[tuple[Tensor, Any]],
        accept: float = 0.95,
        train: Iterable[tuple[Tensor, Any]] | None = None,
    ) -> "DiffGuard":
        """Set what comes from InD calibration images: an adaptive stop's threshold, and the decision's.

        Args:
            data_loader: batches (images in [0, 1], labels) that no model was trained on.
            accept: share of InD images to accept.
            train: batches that a variant of distance ``path`` is fitted on, the denoiser's training
                images for one; None: every second image of ``data_loader``, and the threshold then
                comes from the others alone, so that its promise holds.

        Raises:
            SettingError: too few images to promise that share, or to fit a path on.
        """
        batches = [images for images, _ in data_loader]
        apart = [images for images, _ in train] if train is not None else []
        if self.variant.needs_train and train is None:
            batches, apart = _halves(batches)
        self.variant = fit_variant(self.variant, self.denoiser, self.classifier, batches, apart)
        scores = torch.cat([self.predict(images) for images in batches])
        self.threshold = accept_threshold(scores.cpu().numpy(), accept)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores of images [B, C, H, W] in [0, 1]: shape [B], higher = more OOD.

        Raises:
            RequiresFittingException: the variant takes something from InD images first.
        """
        return self._score(x, unconditional=False).score

    def examine(self, x: Tensor) -> Scored:
        """Scores with their reasons: predicted labels, steps and both reconstructions of each image."""
        return self._score(x, unconditional=True)

    def _score(self, x: Tensor, unconditional: bool) -> Scored:
        if self.variant.needs_fit:
            what = "stop needs calibration images" if self.variant.needs_calibration else "path needs InD images"
            raise RequiresFittingException(f"this variant's {what}: call fit() before predict()")
        requests = [Request(self.classifier, self.variant)]
        [scored] = score_batch(x, self.denoiser, requests, unconditional=unconditional)
        return scored

    def picture(self, x: Tensor) -> Image:
        """Why: a row for each image of x [B, C, H, W] in [0, 1], as a Pillow image.

        From left to right the input, its reconstruction without a label, its reconstruction under the
        predicted label, and how far the last is from what the variant compares it with (white: 0.5).

        Raises:
            SettingError: the variant makes no reconstruction.
        """
        from torchvision.transforms.functional import to_pil_image
        from torchvision.utils import make_grid

        if not self.variant.reconstructs:
            raise SettingError(f"distance: {self.variant.distance} makes no reconstruction that a picture could show")
        scored = self.examine(x)
        assert scored.unconditional is not None
        assert scored.reconstruction is not None
        images = x.to(scored.reconstruction.device)
        against = scored.unconditional if self.variant.against == "unconditional" else images
        difference = ((scored.reconstruction - against).abs() * 2).clamp(0, 1)
        columns = [images, scored.unconditional, scored.reconstruction, difference]
        cells = torch.stack(columns, dim=1).flatten(0, 1).float().cpu()
        # Small images are enlarged as they are, pixel by pixel.
        enlarged = cells.repeat_interleave(times := max(1, 128 // x.shape[-1]), 2).repeat_interleave(times, 3)
        picture: Image = to_pil_image(make_grid(enlarged, nrow=len(columns), padding=4, pad_value=1.0))
        return picture


def _halves(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The images in turn: the first to one half, the second to the other; in batches of at most the same size."""
    images, size = torch.cat(list(batches)), max(map(len, batches))
    first, second = (list(torch.split(half, size)) for half in (images[::2], images[1::2]))
    return first, second


@dataclass(frozen=True)
class Verdict:
    """What DiffGuard says of one image: the label, its score, and whether it is taken for OOD."""

    label: int
    score: float
    is_ood: bool | None


def verdicts(detector: DiffGuard, images: Tensor) -> list[Verdict]:
    """The verdict on each image; ``is_ood`` is None without a threshold.

    Raises:
        SettingError: the threshold is not a finite number. NotFiniteError: a score is not.
    """
    limit = detector.threshold
    if limit is not None and not math.isfinite(limit):
        raise SettingError(f"threshold: {limit} is no number, and no score would be above it")
    scored = detector.examine(images)
    pairs = zip(scored.label.tolist(), scored.score.tolist(), strict=True)
    return [Verdict(label, score, None if limit is None else score > limit) for label, score in pairs]
