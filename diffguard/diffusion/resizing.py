"""Bringing images to the denoiser's size and its output back, as the published code does it."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diffguard.errors import DataError


@dataclass(frozen=True)
class Sizing:
    """Between the side of the input images and the side that the denoiser takes, in pixels.

    Attributes:
        method: "resize" (bilinear, not antialiased), "pad" (black around it) or "none".

    Raises:
        DataError: the sides differ and method is "none", or are the wrong way round to pad.
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
        """Images [B, C, H, W] in [0, 1] at the input size to the denoiser's."""
        if self.method == "pad":
            low = self._margin
            high = self.model_size - self.input_size - low
            return F.pad(images, (low, high, low, high))
        return _resize(images, self.model_size)

    def to_input(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] at the denoiser's size back to the input size."""
        return self.crop(images) if self.method == "pad" else _resize(images, self.input_size)

    def crop(self, images: Tensor) -> Tensor:
        """What of padded images or latents is the input; everything, unless padded."""
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
