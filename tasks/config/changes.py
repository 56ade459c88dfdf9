"""Changes of an image's appearance that leave what it shows: monochrome, inverted, rescaled, padded, blurred, JPEG."""

import io
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

from diffguard.errors import SettingError
from diffguard.settings import ImageFormat, Settings, parse_settings


class Change(Settings):
    """What is done to an image of mode L or RGB, which keeps its mode and size.

    Attributes:
        strength: name of the field that says how much.
        title: of that field, for the axis of a figure.
        is_inverse: whether less of it is a stronger change.
    """

    strength: ClassVar[str]
    title: ClassVar[str]
    is_inverse: ClassVar[bool] = False

    @property
    def value(self) -> float:
        """Its strength, in the unit of `title`."""
        return float(getattr(self, self.strength))

    def apply(self, picture: Image.Image) -> Image.Image:
        """The changed image."""
        raise NotImplementedError

    def check(self, image: ImageFormat) -> None:
        """Raise a SettingError if it changes no image of this format."""


class Monochrome(Change):
    """Colors mixed with their luma (ITU-R 601-2).

    Attributes:
        amount: share of the luma; 1: gray.
    """

    strength: ClassVar[str] = "amount"
    title: ClassVar[str] = "share of gray"
    kind: Literal["monochrome"]
    amount: float = Field(default=1.0, gt=0, le=1)

    def apply(self, picture: Image.Image) -> Image.Image:
        return Image.blend(picture, picture.convert("L").convert(picture.mode), self.amount)

    def check(self, image: ImageFormat) -> None:
        if image.mode == "L":
            raise SettingError("change: monochrome changes no image of mode L; leave it out for this benchmark")


class Inverted(Change):
    """Pixels mixed with their negative.

    Attributes:
        amount: share of the negative; 1: inverted. At 0.5 nothing is left but gray.
    """

    strength: ClassVar[str] = "amount"
    title: ClassVar[str] = "share of the negative"
    kind: Literal["inverted"]
    amount: float = Field(default=1.0, gt=0, le=1)

    def apply(self, picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture).astype(float)
        return _picture(pixels + self.amount * (255 - 2 * pixels))


class Rescaled(Change):
    """Scaled down and up again (bicubic, antialiased).

    Attributes:
        factor: by which the side is divided, and multiplied again.
    """

    strength: ClassVar[str] = "factor"
    title: ClassVar[str] = "factor of scaling down"
    kind: Literal["rescaled"]
    factor: float = Field(gt=1, le=64)

    def apply(self, picture: Image.Image) -> Image.Image:
        return _resized(_resized(picture, self._side(picture.width), self._side(picture.height)), *picture.size)

    def check(self, image: ImageFormat) -> None:
        if self._side(image.size) == image.size:
            raise SettingError(f"change: rescaled: a factor of {self.factor:g} leaves {image.size} pixels as they are")

    def _side(self, side: int) -> int:
        return max(1, round(side / self.factor))


class Padded(Change):
    """Made smaller (bicubic, antialiased), with a border of one value around it.

    Attributes:
        border: of each of the four sides, as a share of the image's.
        fill: value of the border, 0 to 255.
    """

    strength: ClassVar[str] = "border"
    title: ClassVar[str] = "border as a share of the side"
    kind: Literal["padded"]
    border: float = Field(gt=0, lt=0.5)
    fill: int = Field(default=0, ge=0, le=255)

    def apply(self, picture: Image.Image) -> Image.Image:
        width, height = (self._pixels(side) for side in picture.size)
        inner = _resized(picture, max(1, picture.width - 2 * width), max(1, picture.height - 2 * height))
        padded = Image.new(picture.mode, picture.size, self.fill if picture.mode == "L" else (self.fill,) * 3)
        padded.paste(inner, (width, height))
        return padded

    def check(self, image: ImageFormat) -> None:
        if not self._pixels(image.size):
            raise SettingError(f"change: padded: a border of {self.border:g} is no pixel of {image.size}")

    def _pixels(self, side: int) -> int:
        return round(self.border * side)


class Blurred(Change):
    """Convolved with a Gaussian.

    Attributes:
        radius: its standard deviation in pixels.
    """

    strength: ClassVar[str] = "radius"
    title: ClassVar[str] = "standard deviation in pixels"
    kind: Literal["blurred"]
    radius: float = Field(gt=0, le=100)

    def apply(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(self.radius))


class Jpeg(Change):
    """Compressed as JPEG (Pillow's, with its chroma subsampling) and decoded.

    Attributes:
        quality: Pillow's, 1 to 95.
    """

    strength: ClassVar[str] = "quality"
    title: ClassVar[str] = "JPEG quality"
    is_inverse: ClassVar[bool] = True
    kind: Literal["jpeg"]
    quality: int = Field(ge=1, le=95)

    def apply(self, picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=self.quality)
        with Image.open(file) as opened:
            return opened.convert(picture.mode)


ImageChange = Annotated[Monochrome | Inverted | Rescaled | Padded | Blurred | Jpeg, Field(discriminator="kind")]

CHANGES: dict[str, type[Change]] = {
    "monochrome": Monochrome,
    "inverted": Inverted,
    "rescaled": Rescaled,
    "padded": Padded,
    "blurred": Blurred,
    "jpeg": Jpeg,
}
"""By kind."""


def parse_change(values: Any, image: ImageFormat, where: str = "change") -> Change:
    """A change from plain values, checked against the format of the images.

    Raises:
        SettingError: a key or value is wrong, or it changes no such image.
    """
    change: Change = parse_settings(ImageChange, values, where)  # type: ignore[arg-type]
    change.check(image)
    return change


def _resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _picture(pixels: "np.ndarray[Any, Any]") -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
