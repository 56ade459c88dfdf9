"""How far a reconstruction is from an image: higher is farther, one number per image."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffguard.classifiers import Classifier
from diffguard.errors import SettingError

Distance = Callable[[Tensor, Tensor, Classifier], Tensor]
"""(images [B, C, H, W] in [0, 1], others likewise, classifier) -> distances [B]."""


def l1(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """Mean absolute difference of pixel values, in [0, 1]."""
    return (images - others).abs().flatten(1).mean(dim=1)


def logits(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """L1 sum of the difference of the classifier's logits (the paper's CIFAR-10 distance)."""
    with torch.no_grad():
        return (classifier(images) - classifier(others)).abs().sum(dim=1)


DISTANCES: dict[str, Distance] = {"l1": l1, "logits": logits}


def get_distance(name: str) -> Distance:
    """The distance of a name.

    Raises:
        SettingError: no distance has this name.
    """
    if name not in DISTANCES:
        raise SettingError(f"distance: {name!r} is not one of {', '.join(sorted(DISTANCES))}")
    return DISTANCES[name]


def psnr(latents: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB as published: values in [-1, 1], peak 255. Shape [B]."""
    mse = (latents - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / mse)
