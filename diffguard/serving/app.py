"""The HTTP application of a detector: images in, decisions out. `diffguard serve` runs it.

    POST /score    base64 of PNG or JPEG files -> a decision on each image
    GET /health    200 if the model answers, 503 while it loads or after it failed
    GET /version   the detector that is served, and the limits of a request
    GET /metrics   counts and times in Prometheus' text format
    GET /docs      the interface as a page; /openapi.json as a document

Errors are JSON with one line in ``detail``: 4xx for what the client can correct, 5xx for the server's faults.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response, Security
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from torch import Tensor

from diffguard.deploy.detector import Decision, DeployedDetector
from diffguard.errors import DataError
from diffguard.images import to_picture
from diffguard.serving.api_key import HEADER, ApiKey
from diffguard.serving.body_limit import BodyLimit
from diffguard.serving.limits import (
    BODY_SECONDS,
    MAX_OPEN_BYTES,
    MAX_WAITING_IMAGES,
    REQUEST_SECONDS,
    Limits,
    TooLargeError,
)
from diffguard.serving.prometheus import MEDIA_TYPE, Measured, ServerMetrics
from diffguard.serving.requests import decode_images, encode_image
from diffguard.serving.schemas import (
    Health,
    ImageDecision,
    Problem,
    ScoreRequest,
    ScoreResponse,
    Served,
    Version,
    problem_of,
)
from diffguard.serving.service import Service, try_again
from diffguard.version import METHOD_VERSION, __version__


def create_app(
    detector: DeployedDetector | Callable[[], DeployedDetector],
    limits: Limits | None = None,
    *,
    max_waiting: int = MAX_WAITING_IMAGES,
    max_open_bytes: int = MAX_OPEN_BYTES,
    seconds: float = REQUEST_SECONDS,
    body_seconds: float = BODY_SECONDS,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    api_key: str | None = None,
) -> FastAPI:
    """Build the ASGI application of a detector.

    Args:
        detector: a detector, or a function that opens one; it runs in the background, and /health is 503 until then.
        limits: of a request. The body's length is checked before it is read, the images before they are decoded.
        max_waiting: images of all requests that may wait for the model; a request beyond it is answered 503.
        max_open_bytes: bytes of the bodies that are processed at once, which bounds the memory; a request beyond it is
            answered 503, where another one is processed.
        seconds: time-out of a request (503).
        body_seconds: time in which a body has to arrive (408).
        on_failure: called with the error if the detector cannot be opened.
        api_key: the key that clients have to send, see `diffguard.serving.api_key`; None: all requests are answered.
    """
    limits = limits or Limits()
    metrics = ServerMetrics()
    service = Service(
        detector, limits, max(max_waiting, limits.max_images), seconds, on_failure, on_ready=metrics.describe
    )
    metrics.watch(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPIOffline(
        redoc_url=None,
        title="DiffGuard",
        version=__version__,
        summary="Is an image what its classifier takes it for? Decisions of a calibrated OOD detector.",
        description=_DESCRIPTION,
        lifespan=lifespan,
        swagger_ui_parameters={"validatorUrl": None, "defaultModelsExpandDepth": 0, "tryItOutEnabled": True},
    )
    app.add_middleware(BodyLimit, limits=limits, seconds=body_seconds, max_open_bytes=max_open_bytes)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)  # around the body's, so that none is read without the key
    app.add_middleware(Measured, metrics=metrics)
    app.add_exception_handler(Exception, _internal_error)
    _add_routes(app, service, metrics, needs_key=api_key is not None)
    return app


_DESCRIPTION = """
Each image is decided independently: its decision does not depend on the other images of the request.

`is_ood` is true where `p_value` is at most `alpha`, the false-rejection rate: at most this share of in-distribution
images is rejected.

Every error is JSON with one line: `{"detail": "images[3]: a damaged PNG file (…)"}`.
"""


def _add_routes(app: FastAPI, service: Service, metrics: ServerMetrics, *, needs_key: bool) -> None:
    # The middleware checks the key; declared here, it is in the interface's description, and the page can send it.
    schemes = (HTTPBearer(auto_error=False), APIKeyHeader(name=HEADER, auto_error=False))
    security = [Security(scheme) for scheme in schemes] if needs_key else []
    problems: dict[int | str, dict[str, Any]] = {
        400: {"model": Problem, "description": "not JSON"},
        **({401: {"model": Problem, "description": "the key is missing or wrong"}} if needs_key else {}),
        408: {"model": Problem, "description": "the body arrived too slowly"},
        413: {"model": Problem, "description": "too many images or bytes"},
        415: {"model": Problem, "description": "not application/json"},
        422: {"model": Problem, "description": "an image or a field cannot be used"},
        500: {"model": Problem, "description": "a fault of the server; see its log"},
        503: {"model": Problem, "description": "loading, busy or failed; Retry-After says when to try again"},
    }
    body = {"content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}, "required": True}

    @app.post(
        "/score",
        response_model=ScoreResponse,
        response_model_exclude_none=True,
        responses=problems,
        openapi_extra={"requestBody": body},
        summary="Decide on images",
        operation_id="score",
        tags=["decisions"],
        dependencies=security,
    )
    async def score(request: Request) -> Any:
        detector, _ = service.ready()
        _check_type(request)
        try:
            async with asyncio.timeout(service.seconds):
                return await _score(service, metrics, detector, await request.body())
        except TimeoutError:
            raise try_again(f"no decision within {service.seconds:g} seconds; send fewer images") from None

    @app.get(
        "/health",
        response_model=Health,
        responses={503: problems[503]},
        summary="Whether the model answers",
        tags=["server"],
    )
    async def health() -> Any:
        await service.check()
        return Health(status="ok")

    @app.get(
        "/version",
        response_model=Version,
        responses={status: problems[status] for status in (401, 503) if status in problems},
        summary="Which detector is served",
        tags=["server"],
        dependencies=security,
    )
    async def version() -> Any:
        detector, _ = service.ready()
        return Version(
            diffguard=__version__, method_version=METHOD_VERSION, detector=_served(detector), limits=service.limits
        )

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={401: problems[401]} if needs_key else {},
        summary="Counts and times, for Prometheus",
        tags=["server"],
        dependencies=security,
    )
    async def scrape() -> Response:
        return Response(await asyncio.to_thread(metrics.exposition), media_type=MEDIA_TYPE)


async def _score(service: Service, metrics: ServerMetrics, detector: DeployedDetector, body: bytes) -> ScoreResponse:
    try:
        request = await service.read(ScoreRequest.model_validate_json, body)
    except ValidationError as error:
        status, detail = problem_of(error)
        raise HTTPException(status, detail) from None
    if request.images:
        service.check_room(min(len(request.images), service.limits.max_images))
    abandoned = threading.Event()
    try:
        images = await service.read(_prepare, request.images, detector, service.limits, abandoned)
    except TooLargeError as error:
        raise HTTPException(413, str(error)) from None
    except DataError as error:
        raise HTTPException(422, str(error)) from None
    finally:
        abandoned.set()
    decisions = await service.decide(images, request.reconstruction)
    metrics.decided(decisions)
    return await service.read(_response, detector, decisions, request.reconstruction)


def _prepare(
    texts: Sequence[str], detector: DeployedDetector, limits: Limits, abandoned: threading.Event
) -> list[Tensor]:
    images = []
    for index, picture in enumerate(decode_images(texts, limits)):
        images.append(detector.prepare(picture, f"images[{index}]"))
        if abandoned.is_set():
            break  # the request has timed out: its other images are not needed
    return images


def _response(detector: DeployedDetector, decisions: Sequence[Decision], reconstructions: bool) -> ScoreResponse:
    rows = []
    for decision in decisions:
        reconstruction = None
        if reconstructions and decision.reconstruction is not None:
            reconstruction = encode_image(to_picture(decision.reconstruction))
        rows.append(
            ImageDecision(
                label=decision.label,
                class_name=decision.class_name,
                confidence=decision.confidence,
                score=decision.score,
                p_value=decision.p_value,
                is_ood=decision.is_ood,
                diffused=decision.diffused,
                reconstruction=reconstruction,
            )
        )
    return ScoreResponse(decisions=rows, detector=_served(detector))


def _served(detector: DeployedDetector) -> Served:
    info = detector.info
    return Served(name=info.detector, benchmark=info.benchmark, alpha=detector.alpha, bundle=detector.bundle_hash)


def _check_type(request: Request) -> None:
    media_type, *parameters = (part.strip().lower() for part in request.headers.get("content-type", "").split(";"))
    charsets = {parameter for parameter in parameters if parameter.startswith("charset=")}
    if media_type != "application/json" or charsets - {"charset=utf-8", 'charset="utf-8"'}:
        raise HTTPException(415, "Content-Type: send application/json, in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding: send the body as it is, not compressed")


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    """Answer without details: the server logs the traceback, the client does not see it."""
    return JSONResponse({"detail": "internal error; see the server's log"}, 500)
