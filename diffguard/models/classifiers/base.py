"""Classifiers under protection: images in [0, 1] in, logits out, normalization inside."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Classifier(Protocol):
    """The interface of a classifier that the method and the baselines use. Implementations are nn.Modules."""

    num_classes: int
    cam_layer: nn.Module
    """The module whose output GradCAM uses: the last convolutional stage."""

    def __call__(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to penultimate features [B, D]."""
        ...


PART = 64
"""Batch size of a classifier: large enough for speed, small enough for the memory of large images."""


@torch.no_grad()
def predict_logits(classifier: Classifier, images: Tensor) -> Tensor:
    """Compute the logits [B, num_classes] of images [B, C, H, W] in [0, 1], in batches of `PART`, without gradients."""
    return torch.cat([classifier(batch) for batch in torch.split(images, PART)])
