"""Class-conditional latent diffusion."""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from diffguard.errors import DataError
from diffguard.models.denoisers.base import DiffusersDenoiser, LoadOptions, frozen, image_shape_of
from diffguard.models.denoisers.parts import open_part, read_tensor

EMBEDDER_FILE = "class_embedder/model.safetensors"


class LatentDenoiser(DiffusersDenoiser):
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
        self.unet, self.vqvae, self.embedder = frozen(unet), frozen(autoencoder), frozen(embedder)
        self.num_labels = embedder.num_embeddings - 1
        self.null_label = self.num_labels
        unet_config: Any = unet.config
        self.image_shape = image_shape_of(autoencoder, int(unet_config.sample_size))

    @classmethod
    def matches(cls, folder: Path, options: LoadOptions) -> bool:
        return (folder / "vqvae").is_dir()

    @classmethod
    def load(cls, folder: Path, scheduler: Any, options: LoadOptions) -> Self:
        from diffusers import UNet2DConditionModel, VQModel

        if not (folder / EMBEDDER_FILE).is_file():
            raise DataError(f"{folder}: a latent model without {EMBEDDER_FILE}, the embeddings of its labels")
        unet: Any = open_part(UNet2DConditionModel, folder / "unet")
        weight = read_tensor(folder / EMBEDDER_FILE, "weight", (None, unet.config.cross_attention_dim))
        return cls(unet, open_part(VQModel, folder / "vqvae"), label_embedder(weight), scheduler)

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

        self._save_parts(folder, ("unet", "vqvae"))
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / EMBEDDER_FILE).parent.mkdir()
        save_file({"weight": self.embedder.weight.contiguous()}, folder / EMBEDDER_FILE)


def label_embedder(weight: Tensor) -> nn.Embedding:
    """An embedding with these weights, [labels, width]."""
    labels, width = weight.shape
    return nn.Embedding(labels, width, _weight=weight, _freeze=True)
