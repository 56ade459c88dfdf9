"""Every limit and time-out of the endpoint and of copies of detectors, with what it guards against."""

from pydantic import Field

from diffguard.errors import DataError
from diffguard.settings import Settings


class Limits(Settings):
    """How large one request may be.

    Attributes:
        max_images: number of images in a request.
        max_bytes: size of the request's body as it is sent.
        max_pixels: width times height of one image, read from its header.
        max_total_pixels: sum over all images of a request, which bounds the time to decode them. The default
            allows 10 images of `max_pixels`, or 64 of 1920x1080; more photographs than that hardly fit into
            `max_bytes`.
        max_aspect: longer side over shorter side. The shorter side is resized to the model's size first, so that
            a thin strip would become a huge image.
    """

    max_images: int = Field(default=64, ge=1)
    max_bytes: int = Field(default=16 * 2**20, ge=1)
    max_pixels: int = Field(default=16_000_000, ge=1)
    max_total_pixels: int = Field(default=160_000_000, ge=1)
    max_aspect: float = Field(default=100.0, ge=1)


class TooLargeError(DataError):
    """A request exceeds its limits, whatever its images are."""


# What one image may contain.

MAX_SCANS = 32
"""Scans of a JPEG: a file of a few bytes a scan could otherwise keep a processor busy, since each is a pass over all
pixels. Encoders write 18 at most."""

MAX_DATA_URL_HEAD = 200
"""Characters in which ``data:...;base64,`` has to end: a text of megabytes is not searched for it."""

# How much work may be accepted at once.

MAX_WAITING_IMAGES = 2048
"""Images of all requests that wait for the model. Fewer may, where it is slow: those that it could not decide on before
their requests time out are refused at once."""

MAX_WAITING_BYTES = 256 * 2**20
"""Of these images as tensors, which bounds their memory: 2,048 of 3x104x104, or 341 of 3x256x256."""

MAX_OPEN_BYTES = 512 * 2**20
"""Bodies of all requests that are processed at once, and as many bytes again of those that still arrive: it bounds the
memory of bodies."""

REQUEST_BYTES = 64 * 2**10
"""What a request counts beside its body: what is made of it, and its answer."""

MAX_CONNECTIONS = 512
"""Open connections: a process may often have no more than 1,024 open files."""

BACKLOG = 1024
"""Connections that the operating system queues before the server accepts them: a burst is not refused."""

# How much of a detector that is elsewhere is copied into the cache.

MAX_INFO_BYTES = 64 * 2**20
"""Of its detector.json, which is read into memory."""

MAX_BUNDLE_FILES = 10_000
"""Named in it, beside itself."""

MAX_BUNDLE_BYTES = 64 * 2**30
"""Of all these files: the largest diffusion models are some 25 GiB. An endless file does not fill the disk."""

# How long something may take, in seconds.

HEADER_SECONDS = 10.0
"""For the headers of a request to arrive: a silent client does not hold its connection."""

BODY_SECONDS = 30.0
"""For the body of a request to arrive: a slow client does not hold the memory of its body."""

REQUEST_SECONDS = 60.0
"""For a decision, by default; also after which a model that does not answer counts as failed: no client waits for
a model that hangs."""

MAX_REQUEST_SECONDS = 24 * 60 * 60
"""The longest time-out that can be set: a slip of the keyboard is not a server that never gives up."""

STALLED_SECONDS = 30
"""Without an acknowledgement by the client while an answer is sent (Linux only): a client that stops reading does not
hold its connection."""

LINGER_SECONDS = 2.0
"""For which a refused body is still read and discarded: a client that is cut off while it sends sees a broken
connection instead of the answer."""

FRESH_SECONDS = 10.0
"""Age up to which the model's last answer counts as healthy: health checks alone do not keep the model busy."""

RETRY_SECONDS = 1
"""What Retry-After says with 503: clients of a busy server do not ask again at once."""
