"""Text-conditioned denoisers, told a prompt for each class."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffguard.models.denoisers.base import KLDenoiser, frozen

PROMPTS_FILE = "prompts/model.safetensors"


class TextDenoiser(KLDenoiser):
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
        self.unet, self.prompts = frozen(unet), Prompts(prompts)
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
