"""Resizing of images to the denoiser's size, and of its output back, as in the published code."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diffguard.errors import DataError


@dataclass(frozen=True)
class Sizing:
    """Maps between the input images' side and the denoiser's.

    Attributes:
        method: "resize" (bilinear, not antialiased), "pad" (with black) or "none".
        input_size: side of the input images, in pixels.
        model_size: side of the denoiser's images, in pixels.

    Raises:
        DataError: the sides differ and method is "none", or the input is larger and method is "pad".
    """

    method: str
    input_size: int
    model_size: int

    def __post_init__(self) -> None:
        if self.method == "none" and self.input_size != self.model_size:
            raise DataError(
                f"images are {self.input_size} pixels wide, the denoiser takes {self.model_size}; "
                "set process_method to resize or pad"
            )
        if self.method == "pad" and self.input_size > self.model_size:
            raise DataError(
                f"process_method: images of {self.input_size} pixels cannot be padded to the denoiser's "
                f"{self.model_size}; use resize"
            )

    def to_model(self, images: Tensor) -> Tensor:
        """Bring images [B, C, H, W] in [0, 1] from the input size to the denoiser's."""
        if self.method == "pad":
            before = self._margin
            after = self.model_size - self.input_size - before
            return F.pad(images, (before, after, before, after))
        return _resize(images, self.model_size)

    def to_input(self, images: Tensor) -> Tensor:
        """Bring images [B, C, H, W] from the denoiser's size back to the input size."""
        return self.crop(images) if self.method == "pad" else _resize(images, self.input_size)

    def crop(self, images: Tensor) -> Tensor:
        """Remove the padding from padded images or latents; others are returned as they are."""
        if self.method != "pad" or images.shape[-1] != self.model_size:
            return images
        inside = slice(self._margin, self._margin + self.input_size)
        return images[..., inside, inside]

    @property
    def _margin(self) -> int:
        return (self.model_size - self.input_size) // 2


def _resize(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=False)
