"""Diffusion models behind one small interface: images to latents and back, and predicted noise."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffguard.errors import DataError

SCHEDULER_FILE = "scheduler/scheduler_config.json"


class Denoiser(Protocol):
    """What the method asks of a diffusion model.

    Attributes:
        alphas_cumprod: float64, shape [T]: cumulative alphas of the training schedule.
        num_labels: how many class labels it knows, without the null label; 0 if it takes none.
        null_label: the label of unconditional prediction, None if it takes no labels.
        image_shape: (channels, height, width) of the images that it takes.
    """

    alphas_cumprod: Tensor
    num_labels: int
    null_label: int | None
    image_shape: tuple[int, int, int]

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] to latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images [B, C, H, W]; not clamped to [0, 1]."""
        ...

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Predicted noise. x: latents [B, ...]; timestep and label: int64 [B], one per sample."""
        ...


class PixelDenoiser:
    """A class-conditional Diffusers ``UNet2DModel`` on pixels, whose last class embedding is null.

    Latents are the images in [-1, 1].

    Args:
        unet: a UNet2DModel with ``num_class_embeds`` = labels + 1.
        alphas_cumprod: shape [T].
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor) -> None:
        config: Any = unet.config
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self.num_labels = int(config.num_class_embeds) - 1
        self.null_label: int | None = self.num_labels
        self.image_shape = (int(config.in_channels), int(config.sample_size), int(config.sample_size))

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> "PixelDenoiser":
        """Move the network; returns self."""
        self.unet.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        noise: Tensor = self.unet(x, timestep, class_labels=label).sample
        return noise

    def save(self, folder: Path, scheduler: object) -> None:
        """Write the folder that `load_denoiser` reads: Diffusers' own layout, unet/ and scheduler/."""
        self.unet.save_pretrained(folder / "unet")  # type: ignore[operator]
        scheduler.save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]


def load_denoiser(folder: str | Path) -> PixelDenoiser:
    """Load a class-conditional pixel model from a folder in Diffusers' layout (unet/, scheduler/).

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    folder = Path(folder)
    if not (folder / SCHEDULER_FILE).is_file():
        raise DataError(f"{folder}: no denoiser here ({SCHEDULER_FILE} is missing); train one, or name its folder")
    try:
        unet = UNet2DModel.from_pretrained(folder / "unet", local_files_only=True, low_cpu_mem_usage=False)
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise DataError(f"{folder}: the denoiser cannot be loaded: {_first_line(error)}") from error
    if not unet.config.num_class_embeds:
        raise DataError(f"{folder}: the denoiser takes no class labels; a class-conditional one is needed")
    return PixelDenoiser(unet, scheduler.alphas_cumprod)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
