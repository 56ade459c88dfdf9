"""Images drawn from a denoiser: what it has learned, to look at."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffguard.denoisers import Denoiser

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def draw_samples(denoiser: Denoiser, labels: Tensor, *, steps: int = 40, scale: float = 2.0, seed: int = 0) -> Tensor:
    """One image of each label, by DDIM (arXiv 2010.02502) with classifier-free guidance (arXiv 2207.12598).

    Args:
        labels: int64 [B]; of a denoiser without labels only their number counts.
        scale: of the guidance; 1 is plain label-conditional prediction.

    Returns:
        [B, C, H, W] in [0, 1].
    """
    device = denoiser.device
    labels = labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    shape = denoiser.encode(torch.zeros(1, *denoiser.image_shape, device=device)).shape[1:]
    x = torch.randn((len(labels), *shape), generator=generator).to(device)
    last = len(denoiser.alphas_cumprod) - 1
    timesteps = torch.linspace(last, 0, steps).round().long().tolist()
    abar = [float(denoiser.alphas_cumprod[each]) for each in timesteps] + [1.0]
    null = torch.full_like(labels, denoiser.null_label or 0)
    pixels = shape == denoiser.image_shape
    for step, timestep in enumerate(timesteps):
        at = torch.full_like(labels, timestep)
        eps = denoiser.eps(x, at, labels)
        if denoiser.null_label is not None and scale != 1:
            without = denoiser.eps(x, at, null)
            eps = without + scale * (eps - without)
        x0 = (x - (1 - abar[step]) ** 0.5 * eps) / abar[step] ** 0.5
        if pixels:
            x0 = x0.clamp(-1, 1)
            eps = (x - abar[step] ** 0.5 * x0) / (1 - abar[step]) ** 0.5
        x = abar[step + 1] ** 0.5 * x0 + (1 - abar[step + 1]) ** 0.5 * eps
    return denoiser.decode(x).clamp(0, 1)


def sample_grid(denoiser: Denoiser, *, rows: int = 4, most: int = 10, steps: int = 40) -> "Image":
    """Samples as a picture: a column for each of the first labels, at most so many."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    columns = min(denoiser.num_labels or most, most)
    images = draw_samples(denoiser, torch.arange(columns).repeat(rows), steps=steps).float().cpu()
    times = max(1, 64 // images.shape[-1])
    # Small images are enlarged as they are, pixel by pixel.
    enlarged = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    picture: Image = to_pil_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0))
    return picture
