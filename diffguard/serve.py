"""A detector behind HTTP: images in, decisions out. `diffguard serve` runs it.

    POST /score    base64 of PNG or JPEG files -> a decision on each
    GET /health    200 when the model answers, 503 while it loads or after it failed
    GET /version   what is served, and the limits of a request
    GET /docs      this interface as a page, /openapi.json as a document

What cannot be answered rightly is an error: 4xx with one line in ``detail`` for what the client can mend.
"""

import asyncio
import copy
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Security
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from torch import Tensor
from uvicorn.config import LOGGING_CONFIG

from diffguard import METHOD_VERSION, __version__
from diffguard.batching import Batcher, BusyError
from diffguard.body_limit import BodyLimit
from diffguard.connections import Connection, listen
from diffguard.deployed import Decision, DeployedDetector
from diffguard.errors import DataError, DiffGuardError
from diffguard.images import to_picture
from diffguard.requests import Limits, TooLargeError, decode_images, encode_image
from diffguard.serving.api_key import HEADER, VARIABLE, ApiKey, is_loopback
from diffguard.wire import Health, ImageDecision, Problem, ScoreRequest, ScoreResponse, Served, Version, problem_of

LOG = logging.getLogger("diffguard.serve")
FRESH_SECONDS = 10.0
"""An answer of the model that is not older shows that it is well."""

T = TypeVar("T")


class Service:
    """A detector that is being opened, is ready, or failed; and the thread that asks it.

    Args:
        source: a detector, or what opens one.
        limits: of a request.
        max_waiting: images that may wait.
        seconds: after which a request is given up, and a model that does not answer is called failed.
    """

    def __init__(
        self,
        source: DeployedDetector | Callable[[], DeployedDetector],
        limits: Limits,
        max_waiting: int,
        seconds: float,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.limits, self.seconds = limits, seconds
        self.detector: DeployedDetector | None = None
        self.failure: str | None = None
        self._source, self._max_waiting, self._on_failure = source, max_waiting, on_failure
        self._batcher: Batcher[Tensor, Decision] | None = None
        # Decoding is the processor's work; more threads than processors would only take memory.
        self._readers = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "read")
        self._opening = threading.Thread(target=self._open, name="open", daemon=True)

    def start(self) -> None:
        """Open the detector in the background."""
        self._opening.start()

    def close(self) -> None:
        """Answer what waits, and end."""
        if self._batcher is not None:
            self._batcher.close(self.seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def ready(self) -> tuple[DeployedDetector, Batcher[Tensor, Decision]]:
        """The detector and its queue.

        Raises:
            HTTPException: 503, it is still being opened or failed.
        """
        if self.failure is not None:
            raise HTTPException(503, self.failure)
        if self.detector is None or self._batcher is None:
            raise _try_again("the detector is still being loaded; try again in a second")
        return self.detector, self._batcher

    async def read(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do a part of reading a request in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(work, *arguments))

    async def decide(self, images: Sequence[Tensor], reconstructions: bool) -> list[Decision]:
        """Decisions on images [C, H, W], together with those of other requests.

        Raises:
            HTTPException: 503, too much is waiting.
        """
        _, batcher = self.ready()
        try:
            answers = batcher.submit(images, reconstructions)
        except BusyError:
            raise _try_again("too many images wait; try again in a second") from None
        return await asyncio.wrap_future(answers)

    async def check(self) -> None:
        """That the model answers.

        Raises:
            HTTPException: 503, it does not; the detail says why.
        """
        detector, batcher = self.ready()
        if batcher.busy_seconds > self.seconds:
            raise HTTPException(503, f"the model has not answered for {batcher.busy_seconds:.0f} seconds")
        ago = batcher.answered_seconds_ago
        if ago is not None and (ago < FRESH_SECONDS or batcher.busy_seconds > 0):
            return
        try:
            async with asyncio.timeout(self.seconds):
                await self.decide([detector.prepare(detector.example)], False)
        except TimeoutError:
            raise HTTPException(503, f"the model has not answered for {self.seconds:g} seconds") from None
        except HTTPException:
            raise
        except Exception as error:
            LOG.error("the model failed on its own example", exc_info=error)
            raise HTTPException(503, "the model failed; see the server's log") from None

    def _open(self) -> None:
        try:
            detector = self._source if isinstance(self._source, DeployedDetector) else self._source()
            batcher = Batcher(partial(_decide, detector), self.limits.max_images, self._max_waiting)
            # Warm, and known to work, before anybody asks; each row, since a cascade may not need all of them.
            example = detector.prepare(detector.example)
            detector.member_scores(example[None])
            batcher.submit([example], False).result()
        except BaseException as error:
            self.failure = "the detector could not be loaded; see the server's log"
            # Our own errors say in one line what to do; a traceback would hide it.
            LOG.error("%s", error, exc_info=None if isinstance(error, DiffGuardError) else error)
            self._on_failure(error)
            return
        self.detector, self._batcher = detector, batcher
        LOG.info("ready: %s of benchmark %s", detector.info.detector, detector.info.benchmark)


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
            raise _try_again(f"no decision within {service.seconds:g} seconds; send fewer images") from None

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


def _decide(detector: DeployedDetector, images: Sequence[Tensor], reconstructions: bool) -> list[Decision]:
    return detector.decide(torch.stack(list(images)), reconstructions=reconstructions)


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


def _try_again(detail: str) -> HTTPException:
    return HTTPException(503, detail, {"Retry-After": "1"})


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    """The traceback is the log's (the server writes it); the client learns nothing of the inside."""
    return JSONResponse({"detail": "internal error; see the server's log"}, 500)


def serve(
    source: Callable[[], DeployedDetector],
    host: str,
    port: int,
    limits: Limits,
    seconds: float = 60.0,
    api_key: str | None = None,
) -> int:
    """Run the server until SIGTERM or SIGINT; what is in flight then is still answered. Returns the exit code.

    Args:
        source: opens the detector, while /health says 503 already.
        port: 0: any that is free; the log names it.
        seconds, api_key: see `create_app`.

    Raises:
        ServiceError: nothing can listen at that address.
        DiffGuardError: the detector cannot be opened.
    """
    listener = listen(host, port)
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(source, limits, seconds=seconds, body_seconds=min(30.0, seconds), on_failure=stop, api_key=api_key)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=_LOGGING,
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    if api_key is None and not is_loopback(host):
        LOG.warning("everybody who reaches %s is answered: no key is asked for; set %s to ask for one", host, VARIABLE)
    server = uvicorn.Server(config)
    # uvicorn hands the signal on when it is done; to have been told to stop is no failure.
    before = {each: signal.signal(each, lambda *_: sys.exit(0)) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        for each, handler in before.items():
            signal.signal(each, handler)
    if failures and isinstance(failures[0], DiffGuardError):
        raise failures[0]
    return 1 if failures else 0


_LOGGING = copy.deepcopy(LOGGING_CONFIG)
_LOGGING["loggers"]["diffguard"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
