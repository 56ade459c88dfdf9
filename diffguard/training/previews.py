"""What a denoiser has learned: samples drawn from it, and its accuracy as a classifier."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffguard.diffusion.reference import reconstruct
from diffguard.diffusion.schedules import Schedule, Steps
from diffguard.errors import SettingError
from diffguard.models.denoisers.base import Denoiser

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def draw_samples(denoiser: Denoiser, labels: Tensor, *, steps: int = 40, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Draw an image of each label by DDIM (arXiv 2010.02502) with classifier-free guidance (arXiv 2207.12598).

    Args:
        labels: int64 [B]; for a denoiser without labels only their number matters.
        steps: number of DDIM steps.
        scale: of the guidance; 1 is plain label-conditional prediction.

    Returns:
        [B, C, H, W] in [0, 1].
    """
    device = denoiser.device
    generator = torch.Generator().manual_seed(seed)
    shape = denoiser.encode(torch.zeros(1, *denoiser.image_shape, device=device)).shape[1:]
    noise = torch.randn((len(labels), *shape), generator=generator).to(device)
    schedule = _even_schedule(denoiser.alphas_cumprod, steps)
    start = torch.full((len(labels),), schedule.levels - 1)
    is_pixel_space = shape == denoiser.image_shape
    latents = reconstruct(denoiser, noise, start, schedule, labels.to(device), scale=scale, clip=is_pixel_space)
    return denoiser.decode(latents).clamp(0, 1)


def _even_schedule(alphas_cumprod: Tensor, levels: int) -> Schedule:
    """Evenly spaced timesteps from the first to the last, both included; below the first is the clean image."""
    timestep = torch.linspace(0, len(alphas_cumprod) - 1, levels).round().long()
    alpha_bar = alphas_cumprod.double().cpu()[timestep]
    below = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return Schedule(Steps(timestep, below, alpha_bar), Steps(timestep, alpha_bar, below))


def sample_grid(denoiser: Denoiser, *, rows: int = 4, most: int = 10, steps: int = 40) -> "Image":
    """Draw samples as a grid of images, with a column for each of the first labels, at most this number."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    columns = min(denoiser.num_labels or most, most)
    images = draw_samples(denoiser, torch.arange(columns).repeat(rows), steps=steps).float().cpu()
    # Small images are enlarged by repeating pixels.
    factor = max(1, 64 // images.shape[-1])
    enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    picture: Image = to_pil_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0))
    return picture


def accuracy_as_classifier(denoiser: Denoiser, images: Tensor, labels: Tensor) -> float:
    """Compute a denoiser's accuracy as a diffusion classifier, in [0, 1]; see `labels_as_classifier`.

    Args:
        labels: int64 [B].
    """
    return int((labels_as_classifier(denoiser, images) == labels).sum()) / len(labels)


@torch.no_grad()
def labels_as_classifier(
    denoiser: Denoiser,
    images: Tensor,
    *,
    levels: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
    seed: int = 0,
    batch_size: int = 512,
) -> Tensor:
    """Classify images by a denoiser, as a diffusion classifier (arXiv 2303.16203).

    An image is classified as the label under which its noise is predicted best: with the smallest sum, over noise
    levels, of the logarithm of the mean squared error, with the same noise for all labels.

    Args:
        images: [B, C, H, W] in [0, 1].
        levels: noise levels as fractions of the denoiser's timesteps, in [0, 1].
        batch_size: predictions in a network evaluation.

    Returns:
        Labels, int64 [B], on the CPU.

    Raises:
        SettingError: the denoiser takes no labels.
    """
    if not denoiser.num_labels:
        raise SettingError("denoiser: it takes no labels, so that it cannot classify; name one that does")
    device, classes = denoiser.device, denoiser.num_labels
    generator = torch.Generator().manual_seed(seed)
    chosen, count = [], max(1, batch_size // classes)
    for first in range(0, len(images), count):
        x0 = denoiser.encode(images[first : first + count].to(device))
        errors = torch.zeros(len(x0), classes, device=device)
        every_label = torch.arange(classes, device=device).repeat(len(x0))
        for level in levels:
            timestep = min(round(level * len(denoiser.alphas_cumprod)), len(denoiser.alphas_cumprod) - 1)
            alpha_bar = float(denoiser.alphas_cumprod[timestep])
            noise = torch.randn(x0.shape, generator=generator).to(device)
            x = (alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise).repeat_interleave(classes, 0)
            eps = denoiser.eps(x, torch.full_like(every_label, timestep), every_label).float()
            error = (eps.reshape(len(x0), classes, *eps.shape[1:]) - noise[:, None]).square().flatten(2).mean(dim=2)
            errors += error.log()
        chosen.append(errors.argmin(dim=1).cpu())
    return torch.cat(chosen)
