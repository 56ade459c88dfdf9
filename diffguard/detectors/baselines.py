"""Detectors of pytorch-ood as baselines: built, fitted on images or on views of them (logits, features), evaluated."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.classifiers.base import PART
from diffguard.settings import Baseline
from diffguard.utils.importing import import_object


def view(sees: str, classifier: Any) -> Any:
    """Return the function from images [B, C, H, W] in [0, 1] to what a baseline sees of them.

    That is logits [B, K], features [B, D], pixels [B, C * H * W], or the images as they are.
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
    """A view that passes its input on while a detector is fitted on stored views."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.is_stored = False
        # In a tuple, so that it is no submodule: it is on its device already, and shared.
        self._view = (view,)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_stored else self._view[0](x)


def needs_fit(baseline: Baseline) -> bool:
    """Whether a baseline is fitted on the train split."""
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
    """Build a detector of pytorch-ood, and fit it on the train split if it needs that.

    Args:
        name: the baseline's, for messages.
        train: batches (images, labels), iterated from the start each time; empty if there is no train split.
        seen: whether the batches hold, instead of images, what the detector sees of them (see `views_of`).

    Returns:
        A detector whose ``predict`` takes images [B, C, H, W] and returns outlier scores [B].

    Raises:
        SettingError: the detector cannot be imported or built with these arguments, or there is no train split.
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
            model.is_stored = True
        detector.fit(train)
        if isinstance(model, _Switch):
            model.is_stored = False
    return detector


@torch.no_grad()
def detect(detector: Any, images: Tensor, logits: Tensor) -> Tensor:
    """Return a detector's outlier scores [B], higher = more OOD.

    A detector that only needs logits is given these; any other is given the images, in batches of `PART`.

    Args:
        images: [B, C, H, W] in [0, 1].
        logits: [B, K], of the classifier for these images.
    """
    from pytorch_ood.api import LogitsDetector  # takes a second, which a bundle without baselines is spared

    if isinstance(detector, LogitsDetector):
        scores: Tensor = detector.predict_logits(logits)
        return scores
    return torch.cat([detector.predict(batch) for batch in torch.split(images, PART)])


@torch.no_grad()
def views_of(sees: str, classifier: Any, train: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute what a baseline sees of a train split.

    Returns:
        The views [N, ...] and the labels [N], on the CPU; pixels as uint8, a quarter of the memory of floats.

    Raises:
        SettingError: there is no train split.
    """
    see, views, labels = view(sees, classifier), [], []
    for images, label in train:
        batch = see(images).cpu()
        views.append((batch * 255).round().byte() if sees in ("pixels", "images") else batch)
        labels.append(label.cpu())
    if not views:
        raise SettingError("train: a baseline is fitted on it, and this benchmark does not have such a split")
    return torch.cat(views), torch.cat(labels)
