"""Requests and responses of `diffguard.serving.app` as types; the OpenAPI description is generated from them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffguard.serving.limits import Limits

# A gradient as PNG, for "Try it out" on the page.
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

    images: list[str] = Field(description="each base64 of a PNG or JPEG file, with or without data:image/png;base64,")
    reconstruction: bool = Field(False, description="also return each image's reconstruction")


class ImageDecision(BaseModel):
    """The decision on one image."""

    label: int = Field(description="predicted by the classifier")
    class_name: str = Field(description="name of the label")
    confidence: float = Field(description="softmax probability of the label")
    score: float = Field(description="outlier score: higher is more OOD")
    p_value: float = Field(description="conformal p-value of the score among in-distribution images")
    is_ood: bool = Field(description="p_value is at most alpha")
    diffused: bool = Field(description="whether the diffusion model was evaluated; a cascade skips clear cases")
    reconstruction: str | None = Field(None, description="base64 of a PNG file, if requested and computed")


class Served(BaseModel):
    """The detector that is served."""

    name: str = Field(description="its row in the benchmark's result table")
    benchmark: str
    alpha: float = Field(description="false-rejection rate: at most this share of in-distribution images is rejected")
    bundle: str | None = Field(
        description="SHA-256 of the bundle's detector.json, which holds the hashes of its other files"
    )


class ScoreResponse(BaseModel):
    """A decision on each image, in the order of the request."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWER]})

    decisions: list[ImageDecision]
    detector: Served


class Health(BaseModel):
    """Health of the server: the model answers."""

    status: str


class Version(BaseModel):
    """Versions, the detector, and the limits of a request."""

    diffguard: str = Field(description="version of the library")
    method_version: int = Field(description="scores of different method versions are not comparable")
    detector: Served
    limits: Limits


class Problem(BaseModel):
    """An error."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"detail": "images[3]: zero bytes; send base64 of …"}]})

    detail: str = Field(description="one line: what is wrong, where, and what to do")


def problem_of(error: ValidationError) -> tuple[int, str]:
    """The HTTP status and message for a body that is not a `ScoreRequest`; its values are not shown.

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
