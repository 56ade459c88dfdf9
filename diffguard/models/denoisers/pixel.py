"""Denoisers of pixels: unconditional or class-conditional."""

from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.errors import DataError
from diffguard.models.denoisers.base import DiffusersDenoiser, LoadOptions, frozen
from diffguard.models.denoisers.parts import open_part


class PixelDenoiser(DiffusersDenoiser):
    """A Diffusers ``UNet2DModel`` on pixels: class-conditional, or unconditional as guided-diffusion's.

    Latents are the images in [-1, 1]. With class embeddings, the last one is the null label. Of a
    network with learned variance, which predicts 2C channels, the first C are the noise.

    Args:
        unet: a UNet2DModel.
        scheduler: the Diffusers scheduler of its training.
    """

    parts = ("unet",)

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__(scheduler)
        config: Any = unet.config
        self.unet = frozen(unet)
        classes = int(config.num_class_embeds or 0)
        self.num_labels = max(classes - 1, 0)
        self.null_label = self.num_labels if classes else None
        self.image_shape = (int(config.in_channels), int(config.sample_size), int(config.sample_size))

    @classmethod
    def matches(cls, folder: Path, options: LoadOptions) -> bool:
        return True  # a UNet alone, in a folder of its own or not

    @classmethod
    def load(cls, folder: Path, scheduler: Any, options: LoadOptions) -> Self:
        return cls(open_unet(folder), scheduler)

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def predict(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """What the network predicts of these pixels: noise, v or x0, as it was trained (`prediction_type`)."""
        labels = None if self.null_label is None else label
        return predict_padded(self.unet, x, timestep, labels)

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return self._as_noise(self.predict(x, timestep, label), x, timestep)


def predict_padded(unet: Any, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    """What a UNet2DModel predicts for images of any side.

    It halves a side once between two levels; one that cannot be halved so often is padded with zeros, and the
    prediction is cropped.

    Args:
        x: [B, C, H, W].
        timestep: int64 [B].
        labels: int64 [B]; None: the network takes none.

    Returns:
        [B, its out_channels, H, W].
    """
    height, width = x.shape[-2:]
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    if height % multiple or width % multiple:
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
    predicted: Tensor = unet(x, timestep, class_labels=labels).sample
    return predicted[..., :height, :width]


def unet_folder(folder: Path) -> Path:
    """Where a pixel model's UNet is; old ones have its files in the folder itself."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def open_unet(folder: Path) -> nn.Module:
    """The UNet2DModel of a pixel model.

    Raises:
        DataError: it is missing, damaged, or takes no labels although it is class-conditional.
    """
    from diffusers import UNet2DModel

    unet: Any = open_part(UNet2DModel, unet_folder(folder))
    if unet.config.class_embed_type is not None:
        raise DataError(f"{folder}: class_embed_type {unet.config.class_embed_type!r} takes no labels")
    opened: nn.Module = unet
    return opened
