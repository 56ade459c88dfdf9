"""GradCAM maps of a classifier, and masks of them for distinct semantic guidance."""

from math import isqrt
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.models.classifiers.base import Classifier


def cam_mask(classifier: Classifier, images: Tensor, label: Tensor, cut: float, size: tuple[int, int]) -> Tensor:
    """Return the mask where the GradCAM map (arXiv 1610.02391) of a label exceeds a cut.

    Args:
        classifier, images, label: see `cam_maps`.
        cut: in [0, 1], of the map scaled to [0, 1] per image; negative: the mask is where the map is below |cut|.
        size: height and width of the latents.

    Returns:
        [B, 1, height, width], 1.0 inside the mask and 0.0 outside.
    """
    maps = cam_maps(classifier, images, label)[:, None]
    mask = maps > cut if cut >= 0 else maps < -cut
    return F.interpolate(mask.to(images.dtype), size=size, mode="nearest")


def cam_maps(classifier: Classifier, images: Tensor, label: Tensor) -> Tensor:
    """Compute GradCAM maps (arXiv 1610.02391) of labels.

    The output of the classifier's ``cam_layer`` is maps [B, C, h, w], or [B, h, h, C], or, in a vision transformer,
    tokens [B, N, C], of which the last h * h are the patches of a square image.

    The classifier has hooks meanwhile: no other thread may use it.

    Args:
        images: [B, C, H, W] in [0, 1].
        label: int64 [B].

    Returns:
        [B, H, W], scaled to [0, 1] per image.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = cast(nn.Module, classifier)
    # The weights are frozen, so the gradient's graph has to start at the images.
    images = images.detach().clone().requires_grad_()
    targets = [ClassifierOutputTarget(int(y)) for y in label]
    layers = [classifier.cam_layer]
    with torch.enable_grad(), GradCAM(model=network, target_layers=layers, reshape_transform=_as_maps) as cam:
        maps = cam(input_tensor=images, targets=targets)
    return torch.from_numpy(np.asarray(maps)).to(images.device)


def _as_maps(activations: Tensor) -> Tensor:
    """Convert activations of a layer to maps [B, C, h, w]."""
    if activations.ndim == 4:
        _, first, second, last = activations.shape
        # Windowed transformers (timm's Swin) keep channels last.
        return activations.permute(0, 3, 1, 2) if first == second != last else activations
    side = isqrt(activations.shape[1])
    # Class and register tokens precede the patches.
    patches = activations[:, activations.shape[1] - side * side :]
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)
