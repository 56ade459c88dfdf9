"""A denoiser on patches: a network that sees an image's patches as channels (``pixel_unshuffle``), and so is quick."""

import json
import math
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.denoisers.base import LoadOptions
from diffguard.models.denoisers.parts import read_config
from diffguard.models.denoisers.pixel import PixelDenoiser, open_unet, predict_padded, unet_folder

PATCH_FILE = "patch.json"
"""In a saved denoiser's folder: its patch, which a few numbers of channels leave open."""


class PatchedDenoiser(PixelDenoiser):
    """A Diffusers ``UNet2DModel`` on patches of pixels: its channels are the image's times the patch squared.

    Latents are the images in [-1, 1] in their own shape, so that guidance, masks and early stop look at pixels; only
    the network sees them folded, [B, C, H, W] as [B, C patch², H / patch, W / patch].

    Args:
        unet: a UNet2DModel.
        scheduler: the Diffusers scheduler of its training.
        patch: side of a patch in pixels.

    Raises:
        SettingError: the network's channels are not those of such patches.
    """

    def __init__(self, unet: nn.Module, scheduler: Any, patch: int) -> None:
        super().__init__(unet, scheduler)
        channels, side, _ = self.image_shape
        if patch < 1 or channels % patch**2:
            raise SettingError(f"patch: {channels} channels are not of patches of {patch}x{patch} pixels")
        self.patch = patch
        self.image_shape = (channels // patch**2, side * patch, side * patch)

    @classmethod
    def matches(cls, folder: Path, options: LoadOptions) -> bool:
        return _patch(folder, options) != 1

    @classmethod
    def load(cls, folder: Path, scheduler: Any, options: LoadOptions) -> Self:
        return cls(open_unet(folder), scheduler, _patch(folder, options))

    def predict(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        labels = None if self.null_label is None else label
        folded = F.pixel_unshuffle(x, self.patch)
        predicted = predict_padded(self.unet, folded, timestep, labels)[:, : folded.shape[1]]
        return F.pixel_shuffle(predicted, self.patch)

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / PATCH_FILE).write_text(json.dumps({"patch": self.patch}) + "\n", encoding="utf-8")


def _patch(folder: Path, options: LoadOptions) -> int:
    """The patch of a folder's network: as given, as saved, or by its channels; 1: it sees pixels."""
    if options.patch is not None:
        return options.patch
    if (folder / PATCH_FILE).is_file():
        return int(json.loads((folder / PATCH_FILE).read_text(encoding="utf-8"))["patch"])
    config = read_config(unet_folder(folder) / "config.json")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        return 1  # a latent model's; opening it raises the error of another class
    channels = config.get("in_channels")
    return patch_of(channels, folder) if isinstance(channels, int) else 1


def patch_of(channels: int, where: str | Path) -> int:
    """The patch of a network that takes so many channels, of gray or RGB images; 1: it sees pixels.

    Args:
        where: the network's folder, for the message.

    Raises:
        SettingError: it may be either.

    Example:
        >>> patch_of(48, "unet"), patch_of(12, "unet"), patch_of(16, "unet"), patch_of(3, "unet")
        (4, 2, 4, 1)
    """
    if channels == 4:
        raise SettingError(
            f"{where}: 4 channels are of gray images in patches of 2x2 pixels, or of images of 4 channels; say which: "
            "patch: 2 or patch: 1 (--patch)"
        )
    for image_channels in (1, 3):
        patch = math.isqrt(channels // image_channels)
        if image_channels * patch**2 == channels:
            return patch
    return 1
