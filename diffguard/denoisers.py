"""Diffusion models behind one small interface: images to latents and back, and predicted noise."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffguard.errors import DataError

N = TypeVar("N", bound=nn.Module)

SCHEDULER_FILE = "scheduler/scheduler_config.json"
_EMBEDDER_FILE = "class_embedder/model.safetensors"


class Denoiser(Protocol):
    """What the method asks of a diffusion model.

    Attributes:
        alphas_cumprod: float64, shape [T]: cumulative alphas of the training schedule.
        num_labels: how many class labels it knows, without the null label; 0 if it takes none.
        null_label: the label of unconditional prediction; None if it takes no labels (`eps` then
            ignores the label it is given).
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
    """A Diffusers ``UNet2DModel`` on pixels: class-conditional, or unconditional as guided-diffusion's.

    Latents are the images in [-1, 1]. With class embeddings, the last one is the null label. Of a
    network with learned variance, which predicts 2C channels, the first C are the noise.

    Args:
        unet: a UNet2DModel that predicts noise.
        scheduler: the Diffusers scheduler of its training.
    """

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        config: Any = unet.config
        self.unet = _frozen(unet)
        self.scheduler = scheduler
        self.alphas_cumprod = cumulative_alphas(scheduler)
        classes = int(config.num_class_embeds or 0)
        self.num_labels = max(classes - 1, 0)
        self.null_label: int | None = self.num_labels if classes else None
        self.image_shape = (int(config.in_channels), int(config.sample_size), int(config.sample_size))

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> "PixelDenoiser":
        """Move the network; returns self."""
        self.unet.to(device)
        return self

    def channels_last(self) -> "PixelDenoiser":
        """Lay the network's weights out channels-last, faster on most machines; returns self."""
        self.unet.to(memory_format=torch.channels_last)
        return self

    def compile(self, *, fixed: bool = False) -> "PixelDenoiser":
        """Compile the network with torch.compile; returns self. The first batches take minutes.

        Args:
            fixed: every batch will have one shape, as a fixed `Engine`'s have; on a GPU it then runs
                as a CUDA graph.
        """
        graph = fixed and self.device.type == "cuda"
        self.unet.compile(dynamic=not fixed, mode="reduce-overhead" if graph else None)
        return self

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        labels = None if self.null_label is None else label
        noise: Tensor = self.unet(x, timestep, class_labels=labels).sample
        return noise[:, : x.shape[1]]

    def save(self, folder: Path) -> None:
        self.unet.save_pretrained(folder / "unet")  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")


class LatentDenoiser:
    """A class-conditional latent model on Diffusers: ``UNet2DConditionModel`` and ``VQModel``.

    The label enters as one embedded token of cross-attention; the last embedding is the null label.
    Latents are encoded without quantizing and decoded with it (latent diffusion, arXiv 2112.10752).

    Args:
        unet: a UNet2DConditionModel that predicts noise.
        autoencoder: a VQModel on images in [-1, 1].
        embedder: label embeddings, of the UNet's cross-attention width.
        scheduler: the Diffusers scheduler of its training.
    """

    def __init__(self, unet: nn.Module, autoencoder: nn.Module, embedder: nn.Embedding, scheduler: Any) -> None:
        config: Any = autoencoder.config
        self.unet, self.autoencoder, self.embedder = _frozen(unet), _frozen(autoencoder), _frozen(embedder)
        self.scheduler = scheduler
        self.alphas_cumprod = cumulative_alphas(scheduler)
        self.num_labels = embedder.num_embeddings - 1
        self.null_label: int | None = self.num_labels
        unet_config: Any = unet.config
        side = int(unet_config.sample_size) * 2 ** (len(config.block_out_channels) - 1)
        self.image_shape = (int(config.in_channels), side, side)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> "LatentDenoiser":
        """Move the networks; returns self."""
        for network in (self.unet, self.autoencoder, self.embedder):
            network.to(device)
        return self

    def channels_last(self) -> "LatentDenoiser":
        """Lay the networks' weights out channels-last, faster on most machines; returns self."""
        for network in (self.unet, self.autoencoder):
            network.to(memory_format=torch.channels_last)
        return self

    def compile(self, *, fixed: bool = False) -> "LatentDenoiser":
        """Compile the noise network with torch.compile; returns self. The first batches take minutes.

        Args:
            fixed: every batch will have one shape, as a fixed `Engine`'s have; on a GPU it then runs
                as a CUDA graph.
        """
        graph = fixed and self.device.type == "cuda"
        self.unet.compile(dynamic=not fixed, mode="reduce-overhead" if graph else None)
        return self

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.autoencoder.encode(images * 2 - 1).latents  # type: ignore[operator]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.autoencoder.decode(latents).sample  # type: ignore[operator]
        return (images + 1) / 2

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        token: Tensor = self.embedder(label)[:, None]
        noise: Tensor = self.unet(x, timestep, encoder_hidden_states=token).sample
        return noise

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.unet.save_pretrained(folder / "unet")  # type: ignore[operator]
        self.autoencoder.save_pretrained(folder / "vqvae")  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / _EMBEDDER_FILE).parent.mkdir()
        save_file({"weight": self.embedder.weight.contiguous()}, folder / _EMBEDDER_FILE)


class _InPrecision:
    """A denoiser whose network runs under autocast; latents stay as they are."""

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        self._denoiser, self._dtype = denoiser, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self._dtype):
            noise = self._denoiser.eps(x, timestep, label)
        return noise.to(x.dtype)


def in_precision(denoiser: Denoiser, precision: str) -> Denoiser:
    """The denoiser with its noise network in float32, float16 or bfloat16 (torch.autocast)."""
    if precision == "float32":
        return denoiser
    # Delegation covers the rest of the protocol.
    lowered: Any = _InPrecision(denoiser, getattr(torch, precision))
    return lowered  # type: ignore[no-any-return]


def make_scheduler(schedule: str, beta_start: float, beta_end: float, *, learned_variance: bool = False) -> Any:
    """The Diffusers scheduler of 1000 training steps with this beta schedule."""
    from diffusers import DDPMScheduler

    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule=schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        variance_type=variance,
    )


def cumulative_alphas(scheduler: Any) -> Tensor:
    """A Diffusers scheduler's cumulative alphas in float64, shape [T].

    For betas that are linear, or linear in their root, they are computed anew: Diffusers rounds
    betas to float32, the published implementations do not.
    """
    config = scheduler.config
    steps = int(config.num_train_timesteps)
    if config.trained_betas is not None or config.beta_schedule not in ("linear", "scaled_linear"):
        alphas: Tensor = scheduler.alphas_cumprod
        return alphas.double().cpu()
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
    roots = torch.linspace(config.beta_start**power, config.beta_end**power, steps, dtype=torch.float64)
    return (1 - roots ** (1 / power)).cumprod(dim=0)


def label_embedder(weight: Tensor) -> nn.Embedding:
    """An embedding with these weights, [labels, width]."""
    labels, width = weight.shape
    return nn.Embedding(labels, width, _weight=weight, _freeze=True)


def save_denoiser(denoiser: PixelDenoiser | LatentDenoiser, folder: str | Path) -> None:
    """Write the folder that `load_denoiser` reads, in Diffusers' layout, whole or not at all.

    unet/ and scheduler/; a latent model also vqvae/ and class_embedder/.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        made.chmod(0o755)
        denoiser.save(made)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def load_denoiser(folder: str | Path) -> PixelDenoiser | LatentDenoiser:
    """Load a denoiser from a folder in Diffusers' layout: unet/ and scheduler/, or what `save_denoiser` wrote.

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / SCHEDULER_FILE).is_file():
        raise DataError(f"{folder}: no denoiser here ({SCHEDULER_FILE} is missing); train one, or name its folder")
    try:
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        # Diffusers' default for weights, low_cpu_mem_usage, needs accelerate.
        options = {"local_files_only": True, "low_cpu_mem_usage": False}
        if not (folder / "vqvae").is_dir():
            return PixelDenoiser(UNet2DModel.from_pretrained(folder / "unet", **options), scheduler)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **options)
        autoencoder = VQModel.from_pretrained(folder / "vqvae", **options)
        weight = load_file(folder / _EMBEDDER_FILE)["weight"]
        return LatentDenoiser(unet, autoencoder, label_embedder(weight), scheduler)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise DataError(f"{folder}: the denoiser cannot be loaded: {_first_line(error)}") from error


def _frozen(network: N) -> N:
    return network.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
