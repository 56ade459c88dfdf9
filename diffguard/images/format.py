"""The one preprocessing of all images, of benchmarks and of production: mode, size, tensor.

torch is imported only where a tensor is made, so that checking a configuration is quick.
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
    """Convert an image to a mode and a square: resize its short side (bicubic, antialiased), crop its center.

    Args:
        size: side of the square in pixels.
        mode: Pillow's, L or RGB.
        resize: length of the short side after resizing, in pixels; None: size.
        name: for the error message.

    Raises:
        DataError: the image cannot be converted, or its short side is shorter than size after resizing.
    """
    return brought_into_shape(picture, mode, resize or size, size, name)


def read_image(path: str | Path, channels: int, resize: int | None = None, crop: int | None = None) -> "Tensor":
    """Read an image file as [C, H, W] in [0, 1], prepared as a bundle prepares its images.

    Args:
        channels: 1 (gray) or 3 (RGB).
        resize: length of the short side after resizing (bicubic, antialiased), in pixels; None: not resized.
        crop: side of the central square that is then cropped, in pixels; None: not cropped.

    Raises:
        DataError: the file cannot be read or converted, or its short side is shorter than crop.
    """
    picture = read_picture(Path(path))
    return to_tensor(brought_into_shape(picture, "L" if channels == 1 else "RGB", resize, crop, str(path)))


def brought_into_shape(
    picture: Image.Image, mode: str, resize: int | None, crop: int | None, name: str = "the picture"
) -> Image.Image:
    """Convert an image to a mode, resize and crop it; see `to_format` and `read_image`.

    Raises:
        DataError: Pillow cannot convert it, or its short side is shorter than crop.
    """
    try:
        # Palettes, 16 bits and transparency become 8-bit colors first; transparent pixels become black.
        image = picture if picture.mode == mode else _flattened(picture).convert(mode)
        short = min(image.size)
        if resize is not None and short != resize:
            width, height = (max(resize, round(side * resize / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if crop is None or image.size == (crop, crop):
            return image
        if min(image.size) < crop:
            raise ValueError(f"its short side of {min(image.size)} pixels is shorter than the crop of {crop}")
        left, top = ((side - crop) // 2 for side in image.size)
        return image.crop((left, top, left + crop, top + crop))
    except Exception as error:  # Pillow raises any kind of exception on images that it can read and not convert
        raise DataError(f"{name}: the image cannot be brought into shape ({first_line(error)})") from None


def to_tensor(image: Image.Image) -> "Tensor":
    """Convert an image of mode L or RGB to a tensor [C, H, W] in [0, 1]."""
    import torch

    pixels = np.asarray(image)
    return torch.tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).float() / 255


def to_picture(image: "Tensor") -> Image.Image:
    """Convert a tensor [C, H, W] to an image of mode L or RGB; values are clamped to [0, 1]."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _flattened(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits, without transparency and with a mode that converts to L and RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("a value in it is not a finite number")
        top = 65535 if image.mode != "F" else max(1.0, float(values.max()))
        return Image.fromarray((values.clip(0, top) * 255 / top).round().astype(np.uint8))
    if image.mode in ("La", "RGBa"):  # premultiplied by alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")
    # Pillow converts LAB to RGB alone; all other modes convert to both.
    return image.convert("RGB") if image.mode == "LAB" else image
