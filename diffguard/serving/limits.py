"""Every limit of what the endpoint takes."""

from pydantic import Field

from diffguard.errors import DataError
from diffguard.settings import Settings


class Limits(Settings):
    """How much one request may ask for.

    Attributes:
        max_images: images of a request.
        max_bytes: of a whole request, as it is sent.
        max_pixels: width times height of an image, by its header.
        max_total_pixels: of all images of a request together, which bounds the time that reading them takes.
            At the defaults: 10 of the largest images, or 64 of 1920x1080; more photographs than that would
            hardly fit into `max_bytes`.
        max_aspect: longer side over the shorter one: the shorter is brought to the model's size first,
            so that a thin strip would become a huge image.
    """

    max_images: int = Field(default=64, ge=1)
    max_bytes: int = Field(default=16 * 2**20, ge=1)
    max_pixels: int = Field(default=16_000_000, ge=1)
    max_total_pixels: int = Field(default=160_000_000, ge=1)
    max_aspect: float = Field(default=100.0, ge=1)


class TooLargeError(DataError):
    """A request is larger than its limits allow, whatever is in it."""


MAX_SCANS = 32
"""Of a JPEG. Encoders write 18 at most; each is a pass over all pixels and may take as little as ten bytes."""
