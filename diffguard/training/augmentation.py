"""Random changes of training images, drawn for each image by itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguard.settings import Augmentation


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image mirrored, moved and mapped at random; black where nothing is.

    Args:
        images: [B, C, H, W].
        generator: of any device; it need not be the images'.
    """
    if settings.flip:
        mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
    if settings.crop:
        images = _move(images, settings.crop, generator)
    if settings.rotation or settings.scale or settings.shift:
        images = _map(images, settings, generator)
    return images


def _move(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by whole pixels, up to so many along each axis."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    top, left = torch.randint(0, 2 * most + 1, (2, count), generator=generator, device=generator.device).to(
        images.device
    )
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    number = torch.arange(count, device=images.device)
    moved = padded.permute(0, 2, 3, 1)[number[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _map(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image under an affine map of its own."""
    count, side = len(images), images.shape[-1]

    def uniform(most: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=generator.device) * 2 - 1) * most

    angle, scale = torch.deg2rad(uniform(settings.rotation)), 1 + uniform(settings.scale)
    dx, dy = uniform(settings.shift * 2 / side), uniform(settings.shift * 2 / side)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, dx], dim=1), torch.stack([sin, cos, dy], dim=1)], dim=1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
