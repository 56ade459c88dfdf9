"""Why a detector decided as it did, drawn as one row of pictures with the decision beside them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffguard.distances.functions import difference_map
from diffguard.images import to_picture

SMALLEST, LARGEST = 128, 256
"""Sides in pixels between which a cell of the row lies."""

GAP, TITLE, TEXT = 8, 22, 18
INK, FAINT, OOD_RED, IND_GREEN = "#1b1b1b", "#6b6b6b", "#b3261e", "#1a7f37"


@dataclass(frozen=True)
class Reasons:
    """What there is to see of one image, each [C, H, W] in [0, 1].

    Attributes:
        unconditional, reconstruction: without a label, and under the predicted one; None: nothing was diffused.
        heat: where the classifier looks, [H, W] in [0, 1].
        against: what the reconstruction is compared with; see `diffguard.settings.Variant`.
    """

    image: Tensor
    unconditional: Tensor | None
    reconstruction: Tensor | None
    heat: Tensor
    against: str = "input"

    def cells(self) -> dict[str, Tensor]:
        """The pictures by their titles, in order."""
        cells = {"input": self.image.cpu()}
        if self.unconditional is not None and self.reconstruction is not None:
            cells |= {"unconditional": self.unconditional.cpu(), "reconstruction": self.reconstruction.cpu()}
            difference = difference_map(cells["input"], cells["reconstruction"], cells["unconditional"], self.against)
            times = brightening(difference)
            # The map itself is twice the difference.
            cells[f"difference ×{2 * times}"] = (times * difference).clamp(max=1)
        return {**cells, "GradCAM": overlay(self.image.cpu(), self.heat.cpu())}


def brightening(difference: ArrayLike) -> int:
    """How many times a picture [...] in [0, 1] may be multiplied so that all but a hundredth of it still fits, 1 to 16.

    Example:
        >>> brightening([0.0, 0.2, 0.24]), brightening([0.9])
        (4, 1)
    """
    high = np.quantile(np.asarray(difference, float), 0.99)
    return max(times for times in (1, 2, 4, 8, 16) if times == 1 or times * high <= 1)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Heat [H, W] in [0, 1], from red to yellow, over an image [C, H, W] in gray: [3, H, W]."""
    gray = image.mean(dim=0).expand(3, -1, -1)
    color = torch.stack([torch.ones_like(heat), heat, torch.zeros_like(heat)])
    return gray + 0.65 * heat * (color - gray)


def draw_reasons(reasons: Reasons, lines: list[str], is_ood: bool) -> Image.Image:
    """One row: the pictures under their titles, and the decision in words to the right of them.

    Args:
        lines: said of the decision, the first in bold letters; the verdict comes under them.
    """
    cells = {title: _enlarged(to_picture(each)) for title, each in reasons.cells().items()}
    side = max(each.width for each in cells.values())
    fonts = [ImageFont.load_default(size) for size in (13, 15)]
    verdict = ("OOD", OOD_RED) if is_ood else ("InD", IND_GREEN)
    said = [(line, INK if place == 0 else FAINT, fonts[place == 0]) for place, line in enumerate(lines)]
    said.append((*verdict, fonts[1]))
    words = int(max(font.getlength(text) for text, _, font in said)) + 2 * GAP
    height = TITLE + max(side, TEXT * len(said)) + GAP
    canvas = Image.new("RGB", (GAP + len(cells) * (side + GAP) + words, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (title, cell) in enumerate(cells.items()):
        left = GAP + column * (side + GAP)
        draw.text((left + side / 2, TITLE / 2 + 1), title, fill=INK, font=fonts[0], anchor="mm")
        canvas.paste(cell, (left, TITLE))
    left, middle = GAP + len(cells) * (side + GAP) + GAP, TITLE + (height - TITLE - GAP) / 2
    for place, (text, color, font) in enumerate(said):
        draw.text((left, middle + (place - (len(said) - 1) / 2) * TEXT), text, fill=color, font=font, anchor="lm")
    return canvas


def shortened(text: str, most: int = 28) -> str:
    """A name that is not too long for the picture.

    Example:
        >>> shortened("a very long name", 8)
        'a very …'
    """
    return text if len(text) <= most else text[: most - 1] + "…"


def _enlarged(picture: Image.Image) -> Image.Image:
    """In RGB; small images are enlarged as they are, pixel by pixel."""
    width, height = picture.size
    times = max(1, SMALLEST // width)
    if times > 1:
        return picture.convert("RGB").resize((width * times, height * times), Image.Resampling.NEAREST)
    small = picture.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    return small
