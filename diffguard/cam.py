"""Where the classifier looks: GradCAM masks for distinct semantic guidance."""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.classifiers import Classifier


def cam_mask(classifier: Classifier, images: Tensor, label: Tensor, cut: float, size: tuple[int, int]) -> Tensor:
    """Where GradCAM (arXiv 1610.02391) of the label exceeds a cut.

    It hooks the classifier while it runs: no other thread may use the same classifier meanwhile.

    Args:
        images: [B, C, H, W] in [0, 1]. label: int64 [B].
        cut: in [0, 1] of the map scaled to [0, 1] per image; negative: where the map is under |cut|.
        size: height and width of the latents.

    Returns:
        [B, 1, height, width], 1.0 inside the mask and 0.0 outside.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = cast(nn.Module, classifier)
    # Models arrive with frozen weights; GradCAM's graph then has to start at the images.
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad(), GradCAM(model=network, target_layers=[classifier.cam_layer]) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(int(y)) for y in label])
    heat = torch.from_numpy(np.asarray(maps)).to(images.device)[:, None]
    mask = heat > cut if cut >= 0 else heat < -cut
    return F.interpolate(mask.to(images.dtype), size=size, mode="nearest")
