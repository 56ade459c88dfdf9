"""The complexity of an image as its outlier score: a control for dataset bias in reconstruction distances.

The reconstruction of a complex image is farther from it than that of a plain one, whatever its content. This score
measures complexity alone; a reconstruction distance that detects OOD images has to be better.
"""

import torch.nn.functional as F
from pytorch_ood.api import Detector, DetectorInfo, Task
from torch import Tensor
from torch.nn import Module

from diffguard.errors import DataError


class HighFrequency(Detector):  # type: ignore[misc]
    """High-frequency energy: what a small blur removes from an image.

    Of an image x [C, H, W] the score is

        E(x) = mean over c, h, w of (x - b * x)^2,    b = [1 2 1]^T [1 2 1] / 16,

    where b * x blurs each channel, with the image reflected at its edges (the edge not repeated). It is 0 for a
    uniform image and at most 1/4 for values in [0, 1] (a checkerboard).

    Args:
        encoder: maps the input of `predict` to images; None: the input is images.

    Example:
        >>> import torch
        >>> plain, board = torch.full((1, 4, 4), 0.5), torch.eye(2).repeat(2, 2)[None]
        >>> HighFrequency().predict(torch.stack([plain, board])).tolist()
        [0.0, 0.25]
    """

    requires_fit = False
    info = DetectorInfo(tasks=frozenset({Task.CLASSIFICATION}))

    def __init__(self, encoder: Module | None = None) -> None:
        self.encoder = encoder

    def predict(self, x: Tensor) -> Tensor:
        """Return outlier scores [B] of images [B, C, H, W] in [0, 1], H and W at least 2; higher = more OOD.

        Raises:
            DataError: the input has another shape.
        """
        images = x if self.encoder is None else self.encoder(x)
        if images.ndim != 4 or min(images.shape[-2:]) < 2:
            raise DataError(
                f"HighFrequency takes images [B, C, H, W] of at least 2x2 pixels, not {tuple(images.shape)}"
            )
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
        blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
        energy: Tensor = (images - blurred).square().flatten(1).mean(dim=1)
        return energy
