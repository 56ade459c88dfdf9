"""Diffusion transformers."""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from diffguard.models.denoisers.base import KLDenoiser, LoadOptions, frozen
from diffguard.models.denoisers.parts import open_part


class TransformerDenoiser(KLDenoiser):
    """A diffusion transformer (DiT, arXiv 2212.09748) on Diffusers: ``DiTTransformer2DModel`` and ``AutoencoderKL``.

    Its embedding after those of the labels is the null label.

    Args:
        transformer: a DiTTransformer2DModel.
        autoencoder: an AutoencoderKL.
        scheduler: the Diffusers scheduler of its training.
    """

    parts = ("transformer", "vae")

    def __init__(self, transformer: nn.Module, autoencoder: nn.Module, scheduler: Any) -> None:
        config: Any = transformer.config
        super().__init__(autoencoder, int(config.sample_size), scheduler)
        self.transformer = frozen(transformer)
        self.num_labels = int(config.num_embeds_ada_norm)
        self.null_label = self.num_labels

    @classmethod
    def matches(cls, folder: Path, options: LoadOptions) -> bool:
        return (folder / "transformer").is_dir()

    @classmethod
    def load(cls, folder: Path, scheduler: Any, options: LoadOptions) -> Self:
        from diffusers import AutoencoderKL, DiTTransformer2DModel

        transformer = open_part(DiTTransformer2DModel, folder / "transformer")
        return cls(transformer, open_part(AutoencoderKL, folder / "vae"), scheduler)

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        predicted: Tensor = self.transformer(x, timestep=timestep, class_labels=label).sample
        return self._as_noise(predicted, x, timestep)
