"""An image of a source, decoded on request, and the properties of its file."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffguard.errors import DataError
from diffguard.images import picture_of, to_format
from diffguard.settings import ImageFormat


@dataclass
class SourceImage:
    """An image of a source. The properties of its file are filled in when `image` is first read.

    Attributes:
        label, class_name: either or both; neither if its folder has no class folders.
        origin: the file, or the place in the dataset.
        open: returns the picture, or the content or path of its file.
        format: of the file, as Pillow names it; "" if there was none.
        width, height: in pixels.
        quality: of a JPEG file, about 1 to 100; 0 of other formats.
        bytes: of the file; 0: unknown.
    """

    label: int | None
    class_name: str | None
    origin: str
    open: Callable[[], "Image.Image | bytes | Path"]
    format: str = ""
    width: int = 0
    height: int = 0
    quality: int = 0
    bytes: int = 0

    @property
    def image(self) -> Image.Image:
        """The decoded picture.

        Raises:
            DataError: it cannot be read.
        """
        try:
            content = self.open()
            if isinstance(content, Image.Image):
                self.width, self.height = content.size
                return content
            encoded = content.read_bytes() if isinstance(content, Path) else content
            picture = picture_of(encoded, self.origin)
            with Image.open(io.BytesIO(encoded)) as file:
                self.format, self.bytes = file.format or "", len(encoded)
                self.width, self.height = file.size
                self.quality = _jpeg_quality(file)
            return picture
        except DataError as error:
            raise DataError(f"{error}; mend or remove it") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.origin}: the image cannot be read ({error}); mend or remove it") from None

    def formatted(self, form: ImageFormat) -> Image.Image:
        """The picture as the benchmark stores it.

        Raises:
            DataError: it cannot be read or brought into that shape.
        """
        picture = self.image
        try:
            return to_format(picture, form.size, form.mode, form.resize, self.origin)
        except DataError as error:
            raise DataError(f"{error}; mend or remove it") from None


_LUMINANCE = 3688.0
"""Sum of the luminance table of the JPEG standard (ITU T.81, annex K), which is quality 50."""


def _jpeg_quality(picture: Image.Image) -> int:
    """The quality, on the scale of the IJG's encoder, that a JPEG file's luminance table stands for."""
    tables = getattr(picture, "quantization", None)
    if not tables:
        return 0
    scale = 100 * sum(tables[min(tables)]) / _LUMINANCE
    return round(max(1.0, 5000 / scale if scale > 100 else (200 - scale) / 2))
