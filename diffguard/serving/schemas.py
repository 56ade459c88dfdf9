"""What `diffguard.serving.app` takes and gives, as types: the OpenAPI page is made of them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffguard.serving.limits import Limits

# A gradient as PNG: enough for the page's "Try it out".
_EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAI0lEQVR4nGPUEIEAJihdAmWUQEVKoFIlUDUlUMUlUF0QWgQADYMH"
    "xJWddSMAAAAASUVORK5CYII="
)

_ANSWER: dict[str, Any] = {
    "decisions": [
        {
            "label": 3,
            "class_name": "3",
            "confidence": 0.98,
            "score": 4.2,
            "p_value": 0.003,
            "is_ood": True,
            "diffused": True,
        }
    ],
    "detector": {"name": "cfg-w1", "benchmark": "digits", "alpha": 0.05, "bundle": "6242cc88…"},
}


class ScoreRequest(BaseModel):
    """Images to decide on."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"images": [_EXAMPLE], "reconstruction": False}]}
    )

    images: list[str] = Field(description="base64 of a PNG or JPEG file each, with or without data:image/png;base64,")
    reconstruction: bool = Field(False, description="also return what the diffusion model makes of each image")


class ImageDecision(BaseModel):
    """What the detector says of one image."""

    label: int = Field(description="the classifier's")
    class_name: str = Field(description="of the label")
    confidence: float = Field(description="softmax probability of the label")
    score: float = Field(description="outlier score: higher is more OOD")
    p_value: float = Field(description="share of in-distribution images that look as strange, with a guarantee")
    is_ood: bool = Field(description="p_value is at most alpha")
    diffused: bool = Field(description="whether it went through the diffusion model; a cascade spares clear cases")
    reconstruction: str | None = Field(None, description="base64 of a PNG file, if it was asked for and made")


class Served(BaseModel):
    """The detector that decides."""

    name: str = Field(description="its row in the benchmark's table")
    benchmark: str
    alpha: float = Field(description="promised share of in-distribution images that are rejected")
    bundle: str | None = Field(description="SHA-256 of the bundle's description, which holds the hashes of its files")


class ScoreResponse(BaseModel):
    """A decision on each image of the request, in its order."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWER]})

    decisions: list[ImageDecision]
    detector: Served


class Health(BaseModel):
    """The model answers."""

    status: str


class Version(BaseModel):
    """What is served."""

    diffguard: str = Field(description="version of the package")
    method_version: int = Field(description="scores of another one cannot be compared")
    detector: Served
    limits: Limits


class Problem(BaseModel):
    """Why there is no answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"detail": "images[3]: zero bytes; send base64 of …"}]})

    detail: str = Field(description="one line: what is wrong, where, and what to do")


def problem_of(error: ValidationError) -> tuple[int, str]:
    """The HTTP status and the line for a body that is no `ScoreRequest`. Nothing of its values is shown.

    Example:
        >>> try:
        ...     ScoreRequest.model_validate_json('{"images": [], "colour": 1}')
        ... except ValidationError as error:
        ...     print(problem_of(error))
        (422, "the body: unknown key 'colour'; known are images, reconstruction")
    """
    details: list[Any] = error.errors(include_url=False, include_input=False, include_context=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return 400, f"the body: {first['msg']}"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = ", ".join(ScoreRequest.model_fields)
        return 422, f"the body: unknown key {_short(where)}; known are {known}"
    return 422, f"{where or 'the body'}: {first['msg']}"


def _short(key: str) -> str:
    return repr(key if len(key) <= 60 else f"{key[:60]}…")
