"""Diffusion models behind one small interface: images to latents and back, and predicted noise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from diffguard.errors import DataError
from diffguard.models.denoisers.noise_schedule import cumulative_alphas
from diffguard.settings import PretrainedDenoiser
from diffguard.utils.processor import channels_last_corrupts

N = TypeVar("N", bound=nn.Module)


class Denoiser(Protocol):
    """What the method needs of a diffusion model; a custom one has `to` beside this.

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


@runtime_checkable
class HasNetworks(Protocol):
    """A denoiser that names its networks; optional for a custom one."""

    def networks(self) -> dict[str, nn.Module]:
        """Its networks by name."""
        ...


@runtime_checkable
class HasLayout(Protocol):
    """A denoiser whose weights can be laid out in memory; optional for a custom one."""

    def lay_out(self, memory_format: torch.memory_format) -> Any:
        """Lay the weights out, channels-last or contiguous; returns self."""
        ...


@runtime_checkable
class Savable(Protocol):
    """A denoiser that writes a folder from which it can be loaded; optional for a custom one."""

    def save(self, folder: Path) -> None:
        """Write into an empty folder."""
        ...


def networks_of(denoiser: Any) -> dict[str, nn.Module]:
    """A denoiser's networks by name; of a custom one that does not name them, its attributes that are modules."""
    if isinstance(denoiser, HasNetworks):
        return denoiser.networks()
    return {name: value for name, value in vars(denoiser).items() if isinstance(value, nn.Module)}


def with_channels_last(denoiser: Any) -> Any:
    """The denoiser with its weights laid out channels-last, where it offers that and torch can compute with it.

    That is a start: `diffguard.engine.tune` measures which layout is faster.
    """
    return denoiser.lay_out(torch.channels_last) if may_be_channels_last(denoiser) else denoiser


def may_be_channels_last(denoiser: Any) -> bool:
    """Whether a denoiser's weights can be laid out channels-last.

    On a processor not always: see `diffguard.utils.processor.channels_last_corrupts`.
    """
    if not isinstance(denoiser, HasLayout):
        return False
    weights = [weight for network in networks_of(denoiser).values() for weight in network.parameters()]
    on_processor = bool(weights) and weights[0].device.type == "cpu"
    return not (on_processor and channels_last_corrupts(weights))


@dataclass(frozen=True)
class LoadOptions:
    """What a folder alone does not tell of its denoiser.

    Attributes:
        spec, classes: of the settings that name it, and the names of the classes that it is to be told; None: it is
            only loaded.
        patch: of a UNet on patches of pixels, their side; None: by its channels.
    """

    spec: PretrainedDenoiser | None = None
    classes: Sequence[str] = ()
    patch: int | None = None

    @property
    def size(self) -> int | None:
        """Side in pixels of the images that it is to be given; None: that of its training."""
        return None if self.spec is None else self.spec.size


class DiffusersDenoiser(ABC):
    """A family of denoisers on Diffusers: networks that move together, the first of which predicts.

    `diffguard.models.denoisers.loading.FAMILIES` lists the families.

    Attributes:
        parts: names of the attributes that are networks, and of the folders that they are saved in.
        card: what its folder's README.md says of it, which goes where it is saved; None: it has none.
    """

    parts: tuple[str, ...]
    alphas_cumprod: Tensor
    num_labels: int
    null_label: int | None
    image_shape: tuple[int, int, int]
    card: str | None = None

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.alphas_cumprod = cumulative_alphas(scheduler)
        self.prediction_type = str(getattr(scheduler.config, "prediction_type", "epsilon"))
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise DataError(
                f"scheduler: prediction_type {self.prediction_type!r} is none of a discrete diffusion model"
            )

    @classmethod
    @abstractmethod
    def matches(cls, folder: Path, options: LoadOptions) -> bool:
        """Whether a folder in Diffusers' layout holds a denoiser of this family."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, scheduler: Any, options: LoadOptions) -> Self:
        """Load the denoiser of a folder that matches.

        Raises:
            DataError: a part is missing or damaged. SettingError: an option does not fit it.
        """

    def networks(self) -> dict[str, nn.Module]:
        """Its networks by the names in `parts`."""
        return {name: getattr(self, name) for name in self.parts}

    @property
    def _predictor(self) -> nn.Module:
        return self.networks()[self.parts[0]]

    @property
    def device(self) -> torch.device:
        return next(self._predictor.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the networks; returns self."""
        for network in self.networks().values():
            network.to(device)
        return self

    def channels_last(self) -> Self:
        """Lay the networks' weights out channels-last; returns self."""
        return self.lay_out(torch.channels_last)

    def lay_out(self, memory_format: torch.memory_format) -> Self:
        """Lay the networks' weights out in memory, channels-last or contiguous; returns self."""
        for network in self.networks().values():
            network.to(memory_format=memory_format)
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
        self._save_parts(folder, self.parts)

    def _save_parts(self, folder: Path, parts: Sequence[str]) -> None:
        for name in parts:
            network: Any = self.networks()[name]
            _shortest(network).save_pretrained(folder / name)
        self.scheduler.save_pretrained(folder / "scheduler")


class KLDenoiser(DiffusersDenoiser):
    """A model in the latents of an ``AutoencoderKL`` on images in [-1, 1]: their mode, scaled, so that an image
    has one latent."""

    def __init__(self, autoencoder: nn.Module, side: int, scheduler: Any) -> None:
        super().__init__(scheduler)
        config: Any = autoencoder.config
        self.vae = frozen(autoencoder)
        self.image_shape = image_shape_of(autoencoder, side)
        self._scale = float(config.scaling_factor)
        self._shift = float(getattr(config, "shift_factor", None) or 0.0)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(images * 2 - 1).latent_dist.mode()  # type: ignore[operator]
        return (latents - self._shift) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents / self._scale + self._shift).sample  # type: ignore[operator]
        return (images + 1) / 2


def image_shape_of(autoencoder: nn.Module, side: int) -> tuple[int, int, int]:
    """(channels, height, width) of the images whose latents have this side."""
    config: Any = autoencoder.config
    pixels = side * 2 ** (len(config.block_out_channels) - 1)
    return int(config.in_channels), pixels, pixels


class DenoiserWrapper:
    """A denoiser that is another but for what a subclass changes."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_denoiser":
            raise AttributeError(name)
        return getattr(self._denoiser, name)

    def networks(self) -> dict[str, nn.Module]:
        """Those of the denoiser inside."""
        return networks_of(self._denoiser)


class _InPrecision(DenoiserWrapper):
    """A denoiser whose network runs under autocast; latents stay as they are."""

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        super().__init__(denoiser)
        self._dtype = dtype

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self._dtype):
            noise: Tensor = self._denoiser.eps(x, timestep, label)
        return noise.to(x.dtype)


def in_precision(denoiser: Denoiser, precision: str) -> Denoiser:
    """The denoiser with its noise network in float32, float16 or bfloat16 (torch.autocast)."""
    if precision == "float32":
        return denoiser
    # Delegation covers the rest of the protocol.
    lowered: Any = _InPrecision(denoiser, getattr(torch, precision))
    return lowered  # type: ignore[no-any-return]


def _shortest(network: Any) -> Any:
    """A copy in float16 where that holds each weight as it is; otherwise the network itself."""
    weights = [value for value in network.state_dict().values() if value.is_floating_point()]
    is_exact = all(torch.equal(value, value.half().to(value.dtype)) for value in weights)
    return deepcopy(network).half() if is_exact else network


def frozen(network: N) -> N:
    """The network in eval mode, its weights without gradients."""
    return network.eval().requires_grad_(False)
