"""Random augmentation of training images, drawn independently for each image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguard.settings import Augmentation


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Mirror, shift and transform each image at random; uncovered pixels become black.

    Args:
        images: [B, C, H, W].
        generator: on any device, not necessarily that of the images.

    Returns:
        [B, C, H, W].
    """
    if settings.flip:
        mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
    if settings.crop:
        images = _shift(images, settings.crop, generator)
    if settings.rotation or settings.scale or settings.shift:
        images = _transform(images, settings, generator)
    return images


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift each image by at most this number of whole pixels along each axis."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    top, left = torch.randint(0, 2 * most + 1, (2, count), generator=generator, device=generator.device).to(
        images.device
    )
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)
    shifted = padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()


def _transform(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image by a random affine map."""
    count, side = len(images), images.shape[-1]

    def uniform(most: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=generator.device) * 2 - 1) * most

    angle, scale = torch.deg2rad(uniform(settings.rotation)), 1 + uniform(settings.scale)
    dx, dy = uniform(settings.shift * 2 / side), uniform(settings.shift * 2 / side)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, dx], dim=1), torch.stack([sin, cos, dy], dim=1)], dim=1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
