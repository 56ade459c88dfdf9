"""Detectors of pytorch-ood as rows beside the variants: built, fitted on images or on what they see of them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_ood.api import LogitsDetector
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.classifiers.base import PART
from diffguard.settings import Baseline
from diffguard.utils.importing import import_object


def view(sees: str, classifier: Any) -> Any:
    """The function that makes what a baseline sees out of images [B, C, H, W] in [0, 1].

    Logits [B, K], features [B, D], pixels [B, C * H * W], or the images as they are.
    """
    return VIEWS[sees](classifier)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "logits": lambda classifier: classifier,
    "features": lambda classifier: classifier.features,
    "pixels": lambda classifier: nn.Flatten(),
    "images": lambda classifier: nn.Identity(),
}
"""By the name that settings have, what stands in the place of a detector's model."""


class _Switch(nn.Module):
    """A view that, while a detector is fitted again, is given what was seen already."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.is_given = False
        # Not as a submodule: it is on its device, and others use it.
        self._of = (of,)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_given else self._of[0](x)


def needs_fit(baseline: Baseline) -> bool:
    """Whether it is fitted on the train split."""
    return bool(getattr(import_object(baseline.detector), "requires_fit", False))


def fit_baseline(
    name: str,
    baseline: Baseline,
    classifier: Any,
    train: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    seen: bool = False,
) -> Any:
    """Build a pytorch-ood detector, and fit it on the train split where it needs that.

    Args:
        train: batches (images, labels), read anew each time; an empty one: there is no such split.
        seen: these batches hold, in place of images, what the detector sees of them.

    Returns:
        A detector of images [B, C, H, W]; scores by its ``predict``.

    Raises:
        SettingError: it cannot be imported or built with these arguments, or there is no train split.
    """
    factory, model = import_object(baseline.detector), view(baseline.sees, classifier)
    if seen and needs_fit(baseline):
        model = _Switch(model)
    try:
        detector = factory(model, **baseline.arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(f"score.baselines.{name}: {baseline.detector} cannot be built ({error})") from None
    detector.to(device)
    if detector.requires_fit:
        if next(iter(train), None) is None:
            raise SettingError(
                f"score.baselines.{name}: it is fitted on a split train, which this benchmark does not have"
            )
        if isinstance(model, _Switch):
            model.is_given = True
        detector.fit(train)
        if isinstance(model, _Switch):
            model.is_given = False
    return detector


@torch.no_grad()
def detect(detector: Any, images: Tensor, logits: Tensor) -> Tensor:
    """The outlier scores [B] of a detector, higher = more OOD.

    One that looks at logits alone is given those that are there; any other sees the images in parts.

    Args:
        images: [B, C, H, W] in [0, 1].
        logits: [B, K], the classifier's of these images.
    """
    if isinstance(detector, LogitsDetector):
        scores: Tensor = detector.predict_logits(logits)
        return scores
    return torch.cat([detector.predict(part) for part in torch.split(images, PART)])


@torch.no_grad()
def views_of(sees: str, classifier: Any, train: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a baseline sees of a train split, [N, ...], and the labels [N], on the CPU.

    What is pixels is kept as bytes: a quarter of what they take as floats.
    """
    of, parts, labels = view(sees, classifier), [], []
    for images, label in train:
        part = of(images).cpu()
        parts.append((part * 255).round().byte() if sees in ("pixels", "images") else part)
        labels.append(label.cpu())
    if not parts:
        raise SettingError("train: a baseline is fitted on it, and this benchmark does not have such a split")
    return torch.cat(parts), torch.cat(labels)
