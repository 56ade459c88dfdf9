"""DiffGuard as a detector of pytorch-ood (`fit`, `predict`), with verdicts and explanations of single images."""

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
from diffguard.distances.functions import difference_map
from diffguard.engine import Request, Scored, score_batch
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import DEFAULT_VARIANT, Variant


class DiffGuard(Detector):  # type: ignore[misc]
    """OOD detection by semantic mismatch with a diffusion model (arXiv 2308.07687).

    Args:
        classifier: the model under protection; maps images [B, C, H, W] in [0, 1] to logits.
        denoiser: a diffusion model with the classifier's labels.
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
        """Set the thresholds of an adaptive stop, and that of the decision, on InD calibration images.

        Args:
            data_loader: batches (images in [0, 1], labels) that no model was trained on.
            accept: share of InD images to accept, in (0, 1): 1 minus the false-rejection rate.
            train: batches on which a variant with distance ``path`` or ``denoiser-activations`` is fitted, such as
                the denoiser's training images; None: every second image of ``data_loader``, so that the threshold
                comes from the others alone, and its coverage guarantee holds.

        Returns:
            This detector.

        Raises:
            SettingError: there are too few images to guarantee that share, or to fit a path.
            NotFiniteError: a score or a similarity is NaN or infinite.
        """
        batches = [images for images, _ in data_loader]
        train_batches = [images for images, _ in train] if train is not None else []
        if self.variant.needs_train and train is None:
            batches, train_batches = _halves(batches)
        self.variant = fit_variant(self.variant, self.denoiser, self.classifier, batches, train_batches)
        scores = torch.cat([self.predict(images) for images in batches])
        self.threshold = accept_threshold(scores.cpu().numpy(), accept)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Return outlier scores [B] of images [B, C, H, W] in [0, 1]; higher = more OOD.

        Raises:
            RequiresFittingException: the variant has to be fitted on InD images first.
            NotFiniteError: a score is NaN or infinite.
        """
        return self._score(x, unconditional=False).score

    def examine(self, x: Tensor) -> Scored:
        """Return scores [B] of images with their predicted labels, numbers of steps and both reconstructions."""
        return self._score(x, unconditional=True)

    def _score(self, x: Tensor, unconditional: bool) -> Scored:
        if self.variant.needs_fit:
            what = f"distance {self.variant.distance}"
            reason = "stop needs calibration images" if self.variant.needs_calibration else f"{what} needs InD images"
            raise RequiresFittingException(f"this variant's {reason}: call fit() before predict()")
        requests = [Request(self.classifier, self.variant)]
        [scored] = score_batch(x, self.denoiser, requests, unconditional=unconditional)
        return scored

    def picture(self, x: Tensor) -> Image:
        """Draw an explanation: a row for each image of x [B, C, H, W] in [0, 1], as a Pillow image.

        From left to right: the input, its reconstruction without a label, its reconstruction under the predicted
        label, and the absolute difference of the latter from what the variant compares it with (white: 0.5); see
        `diffguard.distances.functions.difference_map`.

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
        difference = difference_map(images, scored.reconstruction, scored.unconditional, self.variant.against)
        columns = [images, scored.unconditional, scored.reconstruction, difference]
        cells = torch.stack(columns, dim=1).flatten(0, 1).float().cpu()
        # Small images are enlarged by repeating pixels.
        factor = max(1, 128 // x.shape[-1])
        enlarged = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        picture: Image = to_pil_image(make_grid(enlarged, nrow=len(columns), padding=4, pad_value=1.0))
        return picture


def _halves(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split images alternately into two halves, in batches of at most the same size."""
    images, size = torch.cat(list(batches)), max(map(len, batches))
    first, second = (list(torch.split(half, size)) for half in (images[::2], images[1::2]))
    return first, second


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image: its predicted label, its score, and whether it is OOD (None: no threshold)."""

    label: int
    score: float
    is_ood: bool | None


def verdicts(detector: DiffGuard, images: Tensor) -> list[Verdict]:
    """Return the verdicts on images [B, C, H, W] in [0, 1]; ``is_ood`` is None without a threshold.

    Raises:
        SettingError: the threshold is NaN or infinite. NotFiniteError: a score is.
    """
    threshold = detector.threshold
    if threshold is not None and not math.isfinite(threshold):
        raise SettingError(f"threshold: {threshold} is not a finite number; give one that scores can exceed")
    scored = detector.examine(images)
    pairs = zip(scored.label.tolist(), scored.score.tolist(), strict=True)
    return [Verdict(label, score, None if threshold is None else score > threshold) for label, score in pairs]
