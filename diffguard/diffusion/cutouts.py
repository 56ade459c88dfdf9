"""Random square cutouts of an image, which the classifier of the clean gradient is shown."""

import torch
import torch.nn.functional as F
from torch import Tensor

Crop = tuple[int, int, int]
"""size, x offset, y offset of a square cutout, in pixels."""


def crop_and_resize(images: Tensor, view: Tensor) -> Tensor:
    """Of each image [B, C, H, W] the rows and columns that a view [B, 2, side] lists: [B, C, side, side]."""
    rows, columns = view[:, 0, None, :, None], view[:, 1, None, None, :]
    tall = images.gather(2, rows.expand(-1, images.shape[1], -1, images.shape[3]))
    return tall.gather(3, columns.expand(-1, images.shape[1], view.shape[-1], -1))


def views_of(crops: list[list[Crop]], cutout_size: int, input_size: int) -> Tensor:
    """The pixels that cutouts show when they are resized twice by nearest neighbour, as published.

    Args:
        crops: for each step, its cutouts; see `draw_crops`.
        cutout_size: side to which a cutout is resized, in pixels.
        input_size: the side after that.

    Returns:
        int64 [steps, cutouts, 2, input_size]: rows, then columns of the image.
    """

    def pixels(first: int, size: int) -> Tensor:
        # In float32, whose rounding decides which pixel is the nearest.
        indices = torch.arange(first, first + size, dtype=torch.float32)[None, None]
        return F.interpolate(F.interpolate(indices, size=cutout_size), size=input_size)[0, 0].long()

    views = [[torch.stack([pixels(oy, size), pixels(ox, size)]) for size, ox, oy in step] for step in crops]
    return torch.stack([torch.stack(step) for step in views])


def draw_crops(steps: int, cutouts: int, side: int, cutout_size: int, seed: int) -> list[list[Crop]]:
    """The cutouts of each guided step, the same for every image, from a generator of their own.

    As published: size int(u * (side - c) + c) with u uniform in [0, 1), then the x, then the y
    offset, uniform integers.
    """
    generator = torch.Generator().manual_seed(seed)
    largest, smallest = side, min(side, cutout_size)

    def one() -> Crop:
        size = int(torch.rand([], generator=generator) * (largest - smallest) + smallest)
        ox = int(torch.randint(0, side - size + 1, (), generator=generator))
        oy = int(torch.randint(0, side - size + 1, (), generator=generator))
        return size, ox, oy

    return [[one() for _ in range(cutouts)] for _ in range(steps)]
