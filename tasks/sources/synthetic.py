"""Where a benchmark's images come from. Each source yields (label, image) pairs, endlessly or not.

The sources of `digits` all pass through the same last step as scikit-learn's digits did: a 32x32
bitmap, counted in 4x4 blocks to 17 gray levels at 8x8.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count as counting
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image as Picture
    from PIL import ImageFont

Image = NDArray[np.uint8]
"""Grayscale, [side, side], or RGB, [side, side, 3]."""

FONTS = [
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
]


def digits(rng: np.random.Generator, classes: list[int]) -> Iterator[tuple[int, Image]]:
    """scikit-learn's handwritten digits of some classes, in random order, each once."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = rng.permutation(np.flatnonzero(np.isin(data.target, classes)))
    for row in rows:
        yield int(data.target[row]), _to_bytes(data.images[row])


def glyphs(rng: np.random.Generator, characters: str) -> Iterator[tuple[int, Image]]:
    """Characters in matplotlib's bundled fonts, each in turn, with a random size, place and slant."""
    for number in counting():
        bitmap = np.asarray(_draw(rng, characters[number % len(characters)], 32)) > 127
        yield -1, _to_bytes(_block_sum(bitmap.astype(float)))


def letters(rng: np.random.Generator, characters: str, size: int) -> Iterator[tuple[int, Image]]:
    """Characters as `glyphs` draws them, with their index as label, in gray at any size: any count of them."""
    from PIL import Image as Picture

    for number in counting():
        index = number % len(characters)
        drawn = _draw(rng, characters[index], 2 * size)
        yield index, np.asarray(drawn.resize((size, size), Picture.Resampling.BOX))


def patches(rng: np.random.Generator, size: int | None = None) -> Iterator[tuple[int, Image]]:
    """Random patches of scikit-learn's two sample photographs.

    Args:
        size: side in pixels of patches in colour, of thrice that side in the photograph; None: 32x32 in gray, shrunk
            to 8x8.
    """
    from PIL import Image as Picture
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    gray = [photo.mean(axis=2) / 255 for photo in photos]
    side = 32 if size is None else 3 * size
    while True:
        index = rng.integers(len(photos))
        top, left = (rng.integers(length - side) for length in gray[index].shape)
        rows, columns = slice(top, top + side), slice(left, left + side)
        if size is None:
            yield -1, _to_bytes(_block_sum(gray[index][rows, columns]))
        else:
            patch = Picture.fromarray(photos[index][rows, columns])
            yield -1, np.asarray(patch.resize((size, size), Picture.Resampling.BOX))


def noise(rng: np.random.Generator, size: int | None = None) -> Iterator[tuple[int, Image]]:
    """In turn: uniform noise, sinusoidal gratings, smooth blobs.

    Args:
        size: side in pixels of images in colour, whose channels are drawn independently; None: 8x8 in gray.
    """
    side, channels = (8, 1) if size is None else (size, 3)
    for kind in cycle((_uniform, _grating, _blobs)):
        drawn = np.stack([kind(rng, side) for _ in range(channels)], axis=2)
        if size is None:
            yield -1, _to_bytes(16 * drawn[:, :, 0])
        else:
            yield -1, np.round(255 * drawn).astype(np.uint8)


def _uniform(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    return rng.uniform(0, 1, (side, side))


def _grating(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    rows, columns = np.mgrid[0:side, 0:side]
    angle, wavelength, phase = rng.uniform(0, np.pi), rng.uniform(2.5, 6) * side / 8, rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    waves: NDArray[np.float64] = (1 + np.sin(2 * np.pi * along / wavelength + phase)) / 2
    return waves


def _blobs(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    rows, columns = np.mgrid[0:side, 0:side] * 8 / side
    blobs = np.zeros((side, side))
    for _ in range(rng.integers(1, 4)):
        cy, cx, width = rng.uniform(0, 7), rng.uniform(0, 7), rng.uniform(0.8, 2.2)
        blobs += np.exp(-((rows - cy) ** 2 + (columns - cx) ** 2) / (2 * width**2))
    return blobs / blobs.max()


SOURCES = {"digits": digits, "glyphs": glyphs, "letters": letters, "patches": patches, "noise": noise}


def _draw(rng: np.random.Generator, character: str, side: int) -> "Picture.Image":
    """A character of a random font, size, place and slant, on a square of this side in pixels."""
    from PIL import Image as Picture
    from PIL import ImageDraw

    unit = side / 32
    font = _font(str(rng.choice(FONTS)), round(int(rng.integers(26, 35)) * unit))
    canvas = Picture.new("L", (side, side))
    x, y = side / 2 + rng.uniform(-2, 2, size=2) * unit
    ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=font, anchor="mm")
    return canvas.rotate(rng.uniform(-12, 12), Picture.Resampling.BILINEAR)


@lru_cache(maxsize=1000)
def _font(name: str, size: int) -> "ImageFont.FreeTypeFont":
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size=size)


def _block_sum(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """[32, 32] in [0, 1] to [8, 8] in [0, 16]."""
    return image.reshape(8, 4, 8, 4).sum(axis=(1, 3))


def _to_bytes(counts: NDArray[np.float64]) -> Image:
    """Counts in [0, 16] to gray values in [0, 255], on the digits' own 17 levels."""
    return np.round(np.clip(np.round(counts), 0, 16) * 255 / 16).astype(np.uint8)
