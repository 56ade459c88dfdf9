"""Random square cutouts of an image, on which the classifier of the clean gradient is evaluated."""

import torch
import torch.nn.functional as F
from torch import Tensor

Crop = tuple[int, int, int]
"""Size, x offset and y offset of a square cutout, in pixels."""


def crop_and_resize(images: Tensor, view: Tensor) -> Tensor:
    """Gather from images [B, C, H, W] the rows and columns that views [B, 2, side] list; returns [B, C, side, side]."""
    rows, columns = view[:, 0, None, :, None], view[:, 1, None, None, :]
    strips = images.gather(2, rows.expand(-1, images.shape[1], -1, images.shape[3]))
    return strips.gather(3, columns.expand(-1, images.shape[1], view.shape[-1], -1))


def views_of(crops: list[list[Crop]], cutout_size: int, input_size: int) -> Tensor:
    """Return the pixels of each cutout after two nearest-neighbor resizings, as published.

    Args:
        crops: the cutouts of each step; see `draw_crops`.
        cutout_size: side after the first resizing, in pixels.
        input_size: side after the second, in pixels.

    Returns:
        int64 [steps, cutouts, 2, input_size]: rows, then columns of the image.
    """

    def pixels(first: int, size: int) -> Tensor:
        # float32, since its rounding decides which pixel is the nearest.
        indices = torch.arange(first, first + size, dtype=torch.float32)[None, None]
        return F.interpolate(F.interpolate(indices, size=cutout_size), size=input_size)[0, 0].long()

    views = [[torch.stack([pixels(oy, size), pixels(ox, size)]) for size, ox, oy in step] for step in crops]
    return torch.stack([torch.stack(step) for step in views])


def draw_crops(steps: int, cutouts: int, side: int, cutout_size: int, seed: int) -> list[list[Crop]]:
    """Draw the cutouts of each guided step, the same for all images, from a generator with this seed.

    As published: a size int(u * (side - c) + c) with c = min(side, cutout_size) and u uniform in [0, 1), then the x
    offset, then the y offset, uniform integers.

    Args:
        steps: number of guided steps.
        cutouts: number of cutouts in each step.
        side: of the image, in pixels.
        cutout_size: smallest size, in pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    largest, smallest = side, min(side, cutout_size)

    def draw() -> Crop:
        size = int(torch.rand([], generator=generator) * (largest - smallest) + smallest)
        ox = int(torch.randint(0, side - size + 1, (), generator=generator))
        oy = int(torch.randint(0, side - size + 1, (), generator=generator))
        return size, ox, oy

    return [[draw() for _ in range(cutouts)] for _ in range(steps)]
