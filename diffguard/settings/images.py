"""The format that every image is brought to."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from diffguard.settings.base import Settings

if TYPE_CHECKING:
    pass


class ImageFormat(Settings):
    """How every image is stored: the one preprocessing of InD and OOD.

    Attributes:
        size: side in pixels.
        mode: Pillow's.
        resize: the short side is brought to this many pixels first; None: to `size`.
    """

    size: int = Field(ge=1)
    mode: Literal["L", "RGB"]
    resize: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _crops(self) -> "ImageFormat":
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: {self.resize} is less than size, {self.size}")
        return self

    @property
    def channels(self) -> int:
        """1 of gray images, 3 of colour."""
        return {"L": 1, "RGB": 3}[self.mode]
