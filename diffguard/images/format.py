"""The one preprocessing that every image goes through, of a benchmark and of production: mode, size, tensor.

It imports torch only where a tensor is asked for, so that checking a configuration is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffguard.errors import DataError
from diffguard.images.decoding import read_picture
from diffguard.utils.text import first_line

if TYPE_CHECKING:
    from torch import Tensor


def to_format(
    picture: Image.Image, size: int, mode: str, resize: int | None = None, name: str = "the picture"
) -> Image.Image:
    """A picture in a mode and as a square: its short side resized (bicubic, antialiased), its middle cut out.

    Args:
        size: side of the square in pixels. mode: Pillow's, L or RGB.
        resize: what the short side is brought to, in pixels; None: size.
        name: what the message calls it.

    Raises:
        DataError: it is of a kind that cannot be brought into this shape.
    """
    return brought_into_shape(picture, mode, resize or size, size, name)


def read_image(path: str | Path, channels: int, resize: int | None = None, crop: int | None = None) -> "Tensor":
    """An image file as [C, H, W] in [0, 1], prepared as a bundle prepares its images.

    Args:
        channels: 1 or 3.
        resize: what the short side is brought to, in pixels (bicubic, antialiased); None: it stays.
        crop: side of the square that is then cut out of the middle; None: nothing is cut.

    Raises:
        DataError: the file cannot be read or brought into shape, or is smaller than crop.
    """
    picture = read_picture(Path(path))
    return to_tensor(brought_into_shape(picture, "L" if channels == 1 else "RGB", resize, crop, str(path)))


def brought_into_shape(
    picture: Image.Image, mode: str, resize: int | None, crop: int | None, name: str = "the picture"
) -> Image.Image:
    """A picture in a mode, resized and cropped; see `to_format` and `read_image`.

    Raises:
        DataError: whatever Pillow finds wrong with it.
    """
    try:
        # A palette, or 16 bits, or transparency, has to become colours first; transparent is black.
        image = picture if picture.mode == mode else _flattened(picture).convert(mode)
        short = min(image.size)
        if resize is not None and short != resize:
            width, height = (max(resize, round(side * resize / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if crop is None or image.size == (crop, crop):
            return image
        if min(image.size) < crop:
            raise ValueError(f"its short side of {min(image.size)} pixels is less than the {crop} to cut out")
        left, top = ((side - crop) // 2 for side in image.size)
        return image.crop((left, top, left + crop, top + crop))
    except Exception as error:  # whatever Pillow raises of a kind of picture that it reads and cannot convert
        raise DataError(f"{name}: the image cannot be brought into shape ({first_line(error)})") from None


def to_tensor(image: Image.Image) -> "Tensor":
    """A picture of mode L or RGB as [C, H, W] in [0, 1]."""
    import torch

    pixels = np.asarray(image)
    return torch.tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).float() / 255


def to_picture(image: "Tensor") -> Image.Image:
    """[C, H, W] in [0, 1], or a little beyond, as a picture of mode L or RGB."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("a value in it is not a finite number")
        top = 65535 if image.mode != "F" else max(1.0, float(values.max()))
        return Image.fromarray((values.clip(0, top) * 255 / top).round().astype(np.uint8))
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by their opacity already
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear).convert("RGB")
    # Of others Pillow makes gray by way of their colours alone.
    return image.convert("RGB") if image.mode == "LAB" else image
