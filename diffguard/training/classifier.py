"""Training of a classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguard.errors import SettingError
from diffguard.models.classifiers.small import (
    ConvClassifier,
    ResidualClassifier,
    SmallClassifier,
    TransformerClassifier,
    WhitenedClassifier,
)
from diffguard.settings import ClassifierTraining
from diffguard.training.loop import Progress, Trainer, as_floats, seeded


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: ClassifierTraining,
    seed: int,
    progress: Progress,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
) -> SmallClassifier:
    """Train a `ConvClassifier`; with blocks a `ResidualClassifier`, with stages a `WhitenedClassifier`, with patches a
    `TransformerClassifier`.

    Args:
        images: [N, C, H, W] in [0, 1], or uint8.
        labels: int64 [N] in 0..num_classes-1.
        checkpoint: see `diffguard.training.train_denoiser`.

    Returns:
        The classifier on the CPU, in eval mode.

    Raises:
        DataError: the checkpoint is damaged, or its training was begun with other settings or images.
        SettingError: the loss is not finite, since the learning rate is too high; images are all of one colour, where
            they are to be whitened; or see `untrained_classifier`.
    """
    sample = as_floats(images[:: -(-len(images) // 5000)])
    moments = float(sample.mean()), float(sample.std())
    untrained = untrained_classifier(images.shape[1:], num_classes, settings, seed, *moments)
    if isinstance(untrained, WhitenedClassifier):
        if not moments[1]:
            raise SettingError("classifier: stages: the images are all of one colour; there is nothing to whiten")
        untrained.whiten(sample[:: -(-len(sample) // 500)])

    def loss(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(trainer.network(images), labels, label_smoothing=settings.label_smoothing)

    size = min(settings.batch_size, len(images))
    steps = settings.epochs * (len(images) // size)
    trainer = Trainer(untrained, loss, images, labels, settings, steps, seed, device, {"classes": num_classes})
    trainer.run(progress, checkpoint)
    classifier: Any = trainer.best()
    trained: SmallClassifier = classifier
    return trained


def untrained_classifier(
    shape: Sequence[int],
    num_classes: int,
    settings: ClassifierTraining,
    seed: int = 0,
    mean: float = 0.5,
    std: float = 0.25,
) -> SmallClassifier:
    """Build the network that `train_classifier` trains, with its initial weights.

    Args:
        shape: of an image, [C, H, W].
        mean, std: normalization of the images in [0, 1].

    Raises:
        SettingError: patches or stages do not fit the images, or timm, which a vision transformer needs, is not
            installed.
    """
    channels, *sides = shape

    def build() -> SmallClassifier:
        if settings.patch is not None:
            grid, rest = divmod(sides[0], settings.patch)
            if rest or sides[0] != sides[1] or not grid:
                raise SettingError(f"classifier: patch: {settings.patch} does not divide images of {sides}")
            sizes = (settings.patch, settings.width, settings.depth, settings.heads)
            return TransformerClassifier(num_classes, grid, *sizes, channels, mean, std)
        if settings.stages is not None:
            if min(sides) - 1 < 2 ** len(settings.stages):
                raise SettingError(
                    f"classifier: stages: images of {sides} cannot be halved {len(settings.stages)} times"
                )
            return WhitenedClassifier(num_classes, settings.stages, channels, mean, std)
        if settings.blocks is None:
            return ConvClassifier(num_classes, settings.width, channels, mean, std)
        return ResidualClassifier(num_classes, settings.blocks, settings.width, channels, mean, std)

    network: SmallClassifier = seeded(seed, build)
    return network
