"""Detectors of pytorch-ood as baselines: built of a classifier's parts, fitted on images or on views, evaluated."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from diffguard.detectors.parts import Parts, view
from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.base import PART
from diffguard.settings import Baseline
from diffguard.utils.importing import import_object
from diffguard.utils.text import first_line


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
    image_shape: tuple[int, int, int] | None = None,
) -> Any:
    """Build a detector of pytorch-ood, and fit it on the train split if it needs that.

    What is random in a fit (Gram holds out a tenth) is drawn from the same seed each time.

    Args:
        name: the baseline's, for messages.
        train: batches (images, labels), iterated from the start each time; empty if there is no train split.
        seen: whether the batches hold, instead of images, what is stored for the detector (see `views_of`).
        image_shape: (channels, height, width) of the images; None: that of the train split's.

    Returns:
        A detector whose ``predict`` takes images [B, C, H, W] and returns outlier scores [B].

    Raises:
        SettingError: the detector cannot be imported, built with these arguments or made of this classifier, or there
            is no train split. DataError: it cannot be fitted on this train split.
    """
    from pytorch_ood.api import Detector

    where = f"score.baselines.{name}"
    if image_shape is None and not seen:
        for images, _ in train:
            image_shape = (images.shape[1], images.shape[2], images.shape[3])
            break
    parts = Parts(baseline, classifier, image_shape, stored=seen)
    detector = _build(where, baseline, parts)
    detector.to(device)
    for member in list(vars(detector).values()):
        if isinstance(member, Detector):  # `Detector.to` leaves out a detector in a detector
            member.to(device)
    if detector.requires_fit:
        if next(iter(train), None) is None:
            raise SettingError(f"{where}: it is fitted on a split train, which this benchmark does not have")
        seeded = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        # A temperature is fitted by its gradient, whatever the caller needs.
        with parts.reading_stored(), seeded, torch.enable_grad():
            torch.manual_seed(0)
            try:
                detector.fit(_Loader(train))
            except (ValueError, AssertionError) as error:
                raise DataError(
                    f"{where}: {baseline.detector} cannot be fitted on the split train ({first_line(error)})"
                ) from None
    return detector


def check_baseline(name: str, baseline: Baseline, classifier: Any, image_shape: tuple[int, int, int]) -> None:
    """Check that a detector can be built of a classifier, trained or not, before anything is fitted.

    Args:
        name: the baseline's, for messages.
        image_shape: (channels, height, width) of the images.

    Raises:
        SettingError: the detector cannot be imported, built with these arguments, or made of this classifier.
    """
    _build(f"score.baselines.{name}", baseline, Parts(baseline, classifier, image_shape, stored=False))


def _build(where: str, baseline: Baseline, parts: Parts) -> Any:
    factory = import_object(baseline.detector)
    try:
        model, arguments = parts.arguments(factory)
        return factory(*model, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise SettingError(f"{where}: {baseline.detector} cannot be built ({first_line(error)})") from None
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None


@dataclass(frozen=True)
class StoredViews:
    """What baselines see of a train split, in batches on a device, from the start at each iteration.

    Attributes:
        values, labels: see `views_of`.
        device: where the batches are.
    """

    values: Tensor
    labels: Tensor
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for values, labels in zip(torch.split(self.values, 256), torch.split(self.labels, 256), strict=True):
            floats = values.float() / 255 if values.dtype == torch.uint8 else values
            yield floats.to(self.device), labels.to(self.device)


class _Loader:
    """Batches as pytorch-ood's detectors take them: with a length, for their log, and labels where their masks are."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return length_hint(self._batches, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for values, labels in self._batches:
            yield values, labels.cpu()


@torch.no_grad()
def detect(detector: Any, images: Tensor, logits: Tensor) -> Tensor:
    """Return a detector's outlier scores [B], higher = more OOD.

    A detector that only needs logits is given these; any other is given the images, in batches of `PART`.

    Args:
        images: [B, C, H, W] in [0, 1].
        logits: [B, K], of the classifier for these images.
    """
    # Takes a second, which a bundle without baselines is spared.
    from pytorch_ood.api import GradientDetector, LogitsDetector

    if isinstance(detector, LogitsDetector):
        scores: Tensor = detector.predict_logits(logits)
        return scores
    with torch.set_grad_enabled(isinstance(detector, GradientDetector)):
        return torch.cat([detector.predict(batch).detach() for batch in torch.split(images, PART)])


@torch.no_grad()
def views_of(sees: str, classifier: Any, train: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute what is stored of a train split for the baselines that see the same.

    Args:
        sees: a name in `diffguard.detectors.parts.VIEWS`; of a baseline, `diffguard.detectors.parts.stored_view`.

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
