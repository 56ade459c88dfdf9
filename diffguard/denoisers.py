"""Diffusion models behind one small interface: images to latents and back, and predicted noise."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.errors import DataError

N = TypeVar("N", bound=nn.Module)

EMBEDDER_FILE = "class_embedder/model.safetensors"
PROMPTS_FILE = "prompts/model.safetensors"
LABELS_FILE = "labels.json"


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


class _Networks:
    """What the families share: networks that move together, the first of which predicts.

    Attributes:
        parts: names of the attributes that are networks, and of the folders that they are saved in.
    """

    parts: tuple[str, ...]
    alphas_cumprod: Tensor

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.alphas_cumprod = cumulative_alphas(scheduler)
        self.prediction_type = str(getattr(scheduler.config, "prediction_type", "epsilon"))
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise DataError(
                f"scheduler: prediction_type {self.prediction_type!r} is none of a discrete diffusion model"
            )

    @property
    def _predictor(self) -> nn.Module:
        return self._network(self.parts[0])

    def _network(self, name: str) -> nn.Module:
        network: nn.Module = getattr(self, name)
        return network

    @property
    def device(self) -> torch.device:
        return next(self._predictor.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the networks; returns self."""
        for name in self.parts:
            self._network(name).to(device)
        return self

    def channels_last(self) -> Self:
        """Lay the networks' weights out channels-last, faster on most machines; returns self."""
        for name in self.parts:
            self._network(name).to(memory_format=torch.channels_last)
        return self

    def compile(self, *, fixed: bool = False) -> Self:
        """Compile the predicting network with torch.compile; returns self. The first batches take minutes.

        Args:
            fixed: every batch will have one shape, as a fixed `Engine`'s have; on a GPU it then runs
                as a CUDA graph.
        """
        graph = fixed and self.device.type == "cuda"
        self._predictor.compile(dynamic=not fixed, mode="reduce-overhead" if graph else None)
        return self

    def _as_noise(self, predicted: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """What the network predicted, as noise. Of a learned variance's 2C channels the first C count."""
        predicted = predicted[:, : x.shape[1]]
        if self.prediction_type == "epsilon":
            return predicted
        alphas = self.alphas_cumprod.to(x.device, torch.float32)[timestep].view(-1, 1, 1, 1).to(x.dtype)
        if self.prediction_type == "v_prediction":
            return alphas.sqrt() * predicted + (1 - alphas).sqrt() * x
        return (x - alphas.sqrt() * predicted) / (1 - alphas).sqrt()

    def save(self, folder: Path) -> None:
        """Write each network and the scheduler into a folder of its own."""
        for name in self.parts:
            self._network(name).save_pretrained(folder / name)  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")


class PixelDenoiser(_Networks):
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
        self.unet = _frozen(unet)
        classes = int(config.num_class_embeds or 0)
        self.num_labels = max(classes - 1, 0)
        self.null_label: int | None = self.num_labels if classes else None
        self.image_shape = (int(config.in_channels), int(config.sample_size), int(config.sample_size))

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
        x: [B, C, H, W]. timestep: int64 [B]. labels: int64 [B]; None: the network takes none.

    Returns:
        [B, its out_channels, H, W].
    """
    height, width = x.shape[-2:]
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    if height % multiple or width % multiple:
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
    predicted: Tensor = unet(x, timestep, class_labels=labels).sample
    return predicted[..., :height, :width]


class LatentDenoiser(_Networks):
    """A class-conditional latent model on Diffusers: ``UNet2DConditionModel`` and ``VQModel``.

    The label enters as one embedded token of cross-attention; the last embedding is the null label.
    Latents are encoded without quantizing and decoded with it (latent diffusion, arXiv 2112.10752).

    Args:
        unet: a UNet2DConditionModel.
        autoencoder: a VQModel on images in [-1, 1].
        embedder: label embeddings, of the UNet's cross-attention width.
        scheduler: the Diffusers scheduler of its training.
    """

    parts = ("unet", "vqvae", "embedder")

    def __init__(self, unet: nn.Module, autoencoder: nn.Module, embedder: nn.Embedding, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.unet, self.vqvae, self.embedder = _frozen(unet), _frozen(autoencoder), _frozen(embedder)
        self.num_labels = embedder.num_embeddings - 1
        self.null_label: int | None = self.num_labels
        unet_config: Any = unet.config
        self.image_shape = _image_shape(autoencoder, int(unet_config.sample_size))

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vqvae.encode(images * 2 - 1).latents  # type: ignore[operator]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vqvae.decode(latents).sample  # type: ignore[operator]
        return (images + 1) / 2

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        token: Tensor = self.embedder(label)[:, None]
        return self._as_noise(self.unet(x, timestep, encoder_hidden_states=token).sample, x, timestep)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        for name in ("unet", "vqvae"):
            self._network(name).save_pretrained(folder / name)  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / EMBEDDER_FILE).parent.mkdir()
        save_file({"weight": self.embedder.weight.contiguous()}, folder / EMBEDDER_FILE)


class _KLNetworks(_Networks):
    """A model in the latents of an ``AutoencoderKL`` on images in [-1, 1]: their mode, scaled, so that an image
    has one latent."""

    def __init__(self, autoencoder: nn.Module, side: int, scheduler: Any) -> None:
        super().__init__(scheduler)
        config: Any = autoencoder.config
        self.vae = _frozen(autoencoder)
        self.image_shape = _image_shape(autoencoder, side)
        self._scale = float(config.scaling_factor)
        self._shift = float(getattr(config, "shift_factor", None) or 0.0)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(images * 2 - 1).latent_dist.mode()  # type: ignore[operator]
        return (latents - self._shift) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents / self._scale + self._shift).sample  # type: ignore[operator]
        return (images + 1) / 2


class TransformerDenoiser(_KLNetworks):
    """A diffusion transformer (DiT, arXiv 2212.09748) on Diffusers: ``DiTTransformer2DModel`` and ``AutoencoderKL``.

    Its embedding after those of the labels is the null label.

    Args:
        transformer: a DiTTransformer2DModel. autoencoder: an AutoencoderKL.
        scheduler: the Diffusers scheduler of its training.
    """

    parts = ("transformer", "vae")

    def __init__(self, transformer: nn.Module, autoencoder: nn.Module, scheduler: Any) -> None:
        config: Any = transformer.config
        super().__init__(autoencoder, int(config.sample_size), scheduler)
        self.transformer = _frozen(transformer)
        self.num_labels = int(config.num_embeds_ada_norm)
        self.null_label: int | None = self.num_labels

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        predicted: Tensor = self.transformer(x, timestep=timestep, class_labels=label).sample
        return self._as_noise(predicted, x, timestep)


class TextDenoiser(_KLNetworks):
    """A text-conditioned latent model (Stable Diffusion, arXiv 2112.10752) that is told a prompt for each label.

    Args:
        unet: a UNet2DConditionModel. autoencoder: an AutoencoderKL.
        prompts: embedded prompts, [labels + 1, tokens, width]; the last is that of unconditional prediction.
        scheduler: the Diffusers scheduler of its training.
        size: side of the images in pixels; None: that of its training.
    """

    parts = ("unet", "vae", "prompts")

    def __init__(
        self, unet: nn.Module, autoencoder: nn.Module, prompts: Tensor, scheduler: Any, size: int | None = None
    ) -> None:
        config: Any = unet.config
        super().__init__(autoencoder, int(config.sample_size), scheduler)
        if size is not None:
            self.image_shape = (self.image_shape[0], size, size)
        self.unet, self.prompts = _frozen(unet), Prompts(prompts)
        self.num_labels = len(prompts) - 1
        self.null_label: int | None = self.num_labels

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        predicted: Tensor = self.unet(x, timestep, encoder_hidden_states=self.prompts(label)).sample
        return self._as_noise(predicted, x, timestep)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        for name in ("unet", "vae"):
            self._network(name).save_pretrained(folder / name)  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / PROMPTS_FILE).parent.mkdir()
        size = str(self.image_shape[1])
        save_file({"embeddings": self.prompts.embeddings.contiguous()}, folder / PROMPTS_FILE, {"size": size})


class Prompts(nn.Module):
    """Embedded prompts by label; the text encoder is not needed any more."""

    embeddings: Tensor

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)

    def forward(self, label: Tensor) -> Tensor:
        return self.embeddings[label]


class RelabeledDenoiser:
    """A denoiser under other labels: label i stands for its ``labels[i]``.

    Args:
        labels: the denoiser's label of each new one.
    """

    def __init__(self, denoiser: Any, labels: Sequence[int]) -> None:
        self._denoiser = denoiser
        self._labels = list(labels)
        self.num_labels = len(labels)
        self.null_label: int | None = self.num_labels

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_denoiser":
            raise AttributeError(name)
        return getattr(self._denoiser, name)

    def to(self, device: torch.device | str) -> "RelabeledDenoiser":
        self._denoiser.to(device)
        return self

    def channels_last(self) -> "RelabeledDenoiser":
        if hasattr(self._denoiser, "channels_last"):
            self._denoiser.channels_last()
        return self

    def compile(self, *, fixed: bool = False) -> "RelabeledDenoiser":
        self._denoiser.compile(fixed=fixed)
        return self

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        known = torch.tensor([*self._labels, self._denoiser.null_label], device=label.device)
        predicted: Tensor = self._denoiser.eps(x, timestep, known[label])
        return predicted

    def save(self, folder: Path) -> None:
        self._denoiser.save(folder)
        (folder / LABELS_FILE).write_text(json.dumps(self._labels) + "\n", encoding="utf-8")


def _image_shape(autoencoder: nn.Module, side: int) -> tuple[int, int, int]:
    config: Any = autoencoder.config
    pixels = side * 2 ** (len(config.block_out_channels) - 1)
    return int(config.in_channels), pixels, pixels


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


def make_scheduler(
    schedule: str, beta_start: float, beta_end: float, steps: int = 1000, *, learned_variance: bool = False
) -> Any:
    """The Diffusers scheduler of so many training steps with this beta schedule."""
    from diffusers import DDPMScheduler

    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMScheduler(
        num_train_timesteps=steps,
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
    rescaled = getattr(config, "rescale_betas_zero_snr", False)
    if rescaled or config.trained_betas is not None or config.beta_schedule not in ("linear", "scaled_linear"):
        alphas: Tensor = scheduler.alphas_cumprod.double().cpu()
        # With zero terminal SNR (arXiv 2305.08891) the last is 0, by which nothing can be divided; as Diffusers' Euler.
        return torch.where(alphas > 0, alphas, 2.0**-24)
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
    roots = torch.linspace(config.beta_start**power, config.beta_end**power, steps, dtype=torch.float64)
    return (1 - roots ** (1 / power)).cumprod(dim=0)


def label_embedder(weight: Tensor) -> nn.Embedding:
    """An embedding with these weights, [labels, width]."""
    labels, width = weight.shape
    return nn.Embedding(labels, width, _weight=weight, _freeze=True)


def _frozen(network: N) -> N:
    return network.eval().requires_grad_(False)
