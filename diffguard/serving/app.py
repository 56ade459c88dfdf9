"""A detector behind HTTP: images in, decisions out. `diffguard serve` runs it.

    POST /score    base64 of PNG or JPEG files -> a decision on each
    GET /health    200 when the model answers, 503 while it loads or after it failed
    GET /version   what is served, and the limits of a request
    GET /docs      this interface as a page, /openapi.json as a document

What cannot be answered rightly is an error: 4xx with one line in ``detail`` for what the client can mend.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Security
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from torch import Tensor

from diffguard.deploy.detector import Decision, DeployedDetector
from diffguard.errors import DataError
from diffguard.images import to_picture
from diffguard.serving.api_key import HEADER, ApiKey
from diffguard.serving.body_limit import BodyLimit
from diffguard.serving.limits import Limits, TooLargeError
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
    max_waiting: int = 256,
    max_requests: int = 32,
    seconds: float = 60.0,
    body_seconds: float = 30.0,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    api_key: str | None = None,
) -> FastAPI:
    """The ASGI application of a detector.

    Args:
        detector: or what opens one, in the background: /health is 503 until then.
        limits: of a request; what they hold is checked before it is decoded, the body's length before it is read.
        max_waiting: images of all requests that may wait for the model; over it a request is answered 503.
        max_requests: with a body that may be answered at once: with `limits.max_bytes` they bound the memory.
        seconds: after which a request is given up (503).
        body_seconds: in which a body has to arrive (408).
        on_failure: called when the detector cannot be opened.
        api_key: what clients have to send; None: everybody is answered. See `diffguard.serving.api_key`.
    """
    limits = limits or Limits()
    service = Service(detector, limits, max(max_waiting, limits.max_images), seconds, on_failure)

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
    app.add_middleware(BodyLimit, limits=limits, seconds=body_seconds, max_requests=max_requests)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)  # outermost: no body is read without it
    app.add_exception_handler(Exception, _internal_error)
    _add_routes(app, service, asks_key=api_key is not None)
    return app


_DESCRIPTION = """
Each image is decided by itself: whatever else is in the request, its decision is the same.

`is_ood` is true where `p_value` is at most `alpha`: of in-distribution images, at most that share is rejected.

Every error is JSON with one line: `{"detail": "images[3]: a damaged PNG file (…)"}`.
"""


def _add_routes(app: FastAPI, service: Service, *, asks_key: bool) -> None:
    # The middleware has checked them; here they are documented, so that the page can send a key.
    ways = (HTTPBearer(auto_error=False), APIKeyHeader(name=HEADER, auto_error=False))
    keys = [Security(way) for way in ways] if asks_key else []
    problems: dict[int | str, dict[str, Any]] = {
        400: {"model": Problem, "description": "not JSON"},
        **({401: {"model": Problem, "description": "the key is missing or wrong"}} if asks_key else {}),
        408: {"model": Problem, "description": "the body came too slowly"},
        413: {"model": Problem, "description": "too many images or bytes"},
        415: {"model": Problem, "description": "not application/json"},
        422: {"model": Problem, "description": "an image or a key cannot be used"},
        500: {"model": Problem, "description": "the server's fault; its log says more"},
        503: {"model": Problem, "description": "loading, busy or failed; Retry-After says when to come again"},
    }
    schema = {"content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}, "required": True}

    @app.post(
        "/score",
        response_model=ScoreResponse,
        response_model_exclude_none=True,
        responses=problems,
        openapi_extra={"requestBody": schema},
        summary="Decide on images",
        operation_id="score",
        tags=["decisions"],
        dependencies=keys,
    )
    async def score(request: Request) -> Any:
        detector, _ = service.ready()
        _check_type(request)
        try:
            async with asyncio.timeout(service.seconds):
                return await _score(service, detector, await request.body())
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
        summary="What is served",
        tags=["server"],
        dependencies=keys,
    )
    async def version() -> Any:
        detector, _ = service.ready()
        return Version(
            diffguard=__version__, method_version=METHOD_VERSION, detector=_served(detector), limits=service.limits
        )


async def _score(service: Service, detector: DeployedDetector, body: bytes) -> ScoreResponse:
    try:
        given = await service.read(ScoreRequest.model_validate_json, body)
    except ValidationError as error:
        status, detail = problem_of(error)
        raise HTTPException(status, detail) from None
    given_up = threading.Event()
    try:
        images = await service.read(_prepared, given.images, detector, service.limits, given_up)
    except TooLargeError as error:
        raise HTTPException(413, str(error)) from None
    except DataError as error:
        raise HTTPException(422, str(error)) from None
    finally:
        given_up.set()
    decisions = await service.decide(images, given.reconstruction)
    return await service.read(_response, detector, decisions, given.reconstruction)


def _prepared(
    texts: Sequence[str], detector: DeployedDetector, limits: Limits, given_up: threading.Event
) -> list[Tensor]:
    images = []
    for place, picture in enumerate(decode_images(texts, limits)):
        images.append(detector.prepare(picture, f"images[{place}]"))
        if given_up.is_set():
            break  # the request's time is over: nobody waits for the others
    return images


def _response(detector: DeployedDetector, decisions: Sequence[Decision], reconstructions: bool) -> ScoreResponse:
    rows = []
    for each in decisions:
        shown = encode_image(to_picture(each.reconstruction)) if each.reconstruction is not None else None
        rows.append(
            ImageDecision(
                label=each.label,
                class_name=each.class_name,
                confidence=each.confidence,
                score=each.score,
                p_value=each.p_value,
                is_ood=each.is_ood,
                diffused=each.diffused,
                reconstruction=shown if reconstructions else None,
            )
        )
    return ScoreResponse(decisions=rows, detector=_served(detector))


def _served(detector: DeployedDetector) -> Served:
    info = detector.info
    return Served(name=info.detector, benchmark=info.benchmark, alpha=detector.alpha, bundle=detector.bundle_hash)


def _check_type(request: Request) -> None:
    kind, *parameters = (part.strip().lower() for part in request.headers.get("content-type", "").split(";"))
    charsets = [
        each for each in parameters if each.startswith("charset=") and each not in ("charset=utf-8", 'charset="utf-8"')
    ]
    if kind != "application/json" or charsets:
        raise HTTPException(415, "Content-Type: send application/json, in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding: send the body as it is, not compressed")


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    """The traceback is the log's (the server writes it); the client learns nothing of the inside."""
    return JSONResponse({"detail": "internal error; see the server's log"}, 500)
