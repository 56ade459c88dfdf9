"""Text-conditioned denoisers, told a prompt for each class."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffguard.errors import DataError, SettingError
from diffguard.models.denoisers.base import KLDenoiser, LoadOptions, frozen
from diffguard.models.denoisers.parts import open_part, open_text_parts, read_tensor
from diffguard.settings import PretrainedDenoiser

PROMPTS_FILE = "prompts/model.safetensors"


class TextDenoiser(KLDenoiser):
    """A text-conditioned latent model (Stable Diffusion, arXiv 2112.10752) that is told a prompt for each label.

    Args:
        unet: a UNet2DConditionModel.
        autoencoder: an AutoencoderKL.
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
        self.null_label = self.num_labels

    @classmethod
    def matches(cls, folder: Path, options: LoadOptions) -> bool:
        return (folder / "vae").is_dir()

    @classmethod
    def load(cls, folder: Path, scheduler: Any, options: LoadOptions) -> Self:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        unet: Any = open_part(UNet2DConditionModel, folder / "unet")
        if unet.config.addition_embed_type is not None:
            raise DataError(
                f"{folder}: it asks for more than a prompt ({unet.config.addition_embed_type}), as SDXL does"
            )
        vae = open_part(AutoencoderKL, folder / "vae")
        path = folder / PROMPTS_FILE
        if path.is_file():
            embeddings = read_tensor(path, "embeddings", (None, None, unet.config.cross_attention_dim))
            return cls(unet, vae, embeddings, scheduler, _saved_size(path))
        if options.spec is None:
            raise DataError(f"{folder}: a text-conditioned model has to be opened with the names of classes")
        return cls(unet, vae, _embed_prompts(folder, options.spec, options.classes), scheduler, options.size)

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        predicted: Tensor = self.unet(x, timestep, encoder_hidden_states=self.prompts(label)).sample
        return self._as_noise(predicted, x, timestep)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self._save_parts(folder, ("unet", "vae"))
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


def _saved_size(path: Path) -> int:
    """The side of images that a saved denoiser was opened for."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        size = (file.metadata() or {}).get("size", "")
    if not size.isdecimal() or not 8 <= int(size) <= 4096:
        raise DataError(f"{path}: its size, {size!r}, is not the side of images")
    return int(size)


@torch.no_grad()
def _embed_prompts(folder: Path, spec: PretrainedDenoiser, classes: Sequence[str]) -> Tensor:
    """The prompts of each class and of none, embedded by its text encoder: [classes + 1, tokens, width]."""
    if find_spec("transformers") is None:
        raise SettingError(f"{folder}: transformers is not installed; pip install 'diffguard-ood[models]'")

    if "{}" not in spec.prompt:
        raise SettingError(f"denoiser.prompt: {spec.prompt!r} has no {{}} for the name of the class")
    if all(name.isdigit() for name in classes):
        raise SettingError("denoiser.prompt: the names of the classes are not known; give them as classes")
    tokenizer, encoder = open_text_parts(folder)
    prompts = [*(spec.prompt.replace("{}", name) for name in classes), spec.null_prompt]
    embeddings = []
    for first in range(0, len(prompts), 64):
        tokens = tokenizer(
            prompts[first : first + 64],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # As Stable Diffusion's own pipeline: padding is attended to, unless the encoder says otherwise.
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        embeddings.append(encoder(tokens.input_ids, attention_mask=mask)[0].float())
    return torch.cat(embeddings)
