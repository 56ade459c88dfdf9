"""The complexity of an image as its outlier score: what a reconstruction's distance has to be better than.

A reconstruction of a busy picture is farther from it than that of a plain one, whatever the model knows
of its content. This control knows nothing but that.
"""

import torch.nn.functional as F
from pytorch_ood.api import Detector, DetectorInfo, Task
from torch import Tensor
from torch.nn import Module

from diffguard.errors import DataError


class HighFrequency(Detector):  # type: ignore[misc]
    """High-frequency energy: how much of an image a small blur takes away.

    Of an image x [C, H, W] the score is

        E(x) = mean over c, h, w of (x - b * x)^2,    b = [1 2 1]^T [1 2 1] / 16,

    where b * x blurs each channel, and the image goes on past its edges as in a mirror, the edge itself
    not repeated. 0 for a plain image; the most that values in [0, 1] can reach is 1/4 (a checkerboard).

    Args:
        encoder: applied to what `predict` gets, and has to give images; None: nothing.

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
        """Outlier scores of images [B, C, H, W] in [0, 1], H and W from 2 up: shape [B], higher = more OOD.

        Raises:
            DataError: they are not such images.
        """
        images = x if self.encoder is None else self.encoder(x)
        if images.ndim != 4 or min(images.shape[-2:]) < 2:
            raise DataError(f"images [B, C, H, W] from 2x2 pixels up have a frequency; these are {tuple(images.shape)}")
        wide = F.pad(images, (1, 1, 1, 1), mode="reflect")
        rows = (wide[..., :-2, :] + 2 * wide[..., 1:-1, :] + wide[..., 2:, :]) / 4
        blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
        energy: Tensor = (images - blurred).square().flatten(1).mean(dim=1)
        return energy
