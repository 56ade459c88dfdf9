"""Classifiers under protection: images in [0, 1] in, logits out, normalization inside."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Classifier(Protocol):
    """What the method and the baselines ask of a classifier. Implementations are nn.Modules."""

    num_classes: int
    cam_layer: nn.Module
    """The last convolutional stage, where GradCAM looks."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] to penultimate features [B, D]."""
        ...


PART = 64
"""Images that a classifier sees at once: enough for its speed, few enough for the memory of large images."""


@torch.no_grad()
def predict_logits(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits of a batch of any size, without gradients."""
    return torch.cat([classifier(part) for part in torch.split(images, PART)])
