"""Where the classifier looks: GradCAM masks for distinct semantic guidance."""

from math import isqrt
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.models.classifiers.base import Classifier


def cam_mask(classifier: Classifier, images: Tensor, label: Tensor, cut: float, size: tuple[int, int]) -> Tensor:
    """Where GradCAM (arXiv 1610.02391) of the label exceeds a cut.

    Args:
        cut: in [0, 1] of the map scaled to [0, 1] per image; negative: where the map is under |cut|.
        size: height and width of the latents.
        classifier, images, label: see `cam_maps`.

    Returns:
        [B, 1, height, width], 1.0 inside the mask and 0.0 outside.
    """
    heat = cam_maps(classifier, images, label)[:, None]
    mask = heat > cut if cut >= 0 else heat < -cut
    return F.interpolate(mask.to(images.dtype), size=size, mode="nearest")


def cam_maps(classifier: Classifier, images: Tensor, label: Tensor) -> Tensor:
    """GradCAM maps at the images' size, scaled to [0, 1] per image, [B, H, W].

    The classifier's ``cam_layer`` gives maps [B, C, h, w], or [B, h, h, C], or, in a vision transformer,
    tokens [B, N, C], of which the last h * w are the patches of a square.

    It hooks the classifier while it runs: no other thread may use the same classifier meanwhile.

    Args:
        images: [B, C, H, W] in [0, 1]. label: int64 [B].
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = cast(nn.Module, classifier)
    # Models arrive with frozen weights; GradCAM's graph then has to start at the images.
    images = images.detach().clone().requires_grad_()
    targets = [ClassifierOutputTarget(int(y)) for y in label]
    layers = [classifier.cam_layer]
    with torch.enable_grad(), GradCAM(model=network, target_layers=layers, reshape_transform=_as_maps) as cam:
        maps = cam(input_tensor=images, targets=targets)
    return torch.from_numpy(np.asarray(maps)).to(images.device)


def _as_maps(activations: Tensor) -> Tensor:
    if activations.ndim == 4:
        _, first, second, last = activations.shape
        # Windowed transformers (timm's Swin) keep channels last.
        return activations.permute(0, 3, 1, 2) if first == second != last else activations
    side = isqrt(activations.shape[1])
    # Class and register tokens come first.
    patches = activations[:, activations.shape[1] - side * side :]
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)
