"""The detector behind the endpoint: opened in the background, called by one thread, its health checked."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from fastapi import HTTPException
from torch import Tensor

from diffguard.deploy.detector import Decision, DeployedDetector
from diffguard.errors import DiffGuardError
from diffguard.serving.batching import Batcher, BusyError
from diffguard.serving.limits import FRESH_SECONDS, RETRY_SECONDS, Limits

LOG = logging.getLogger("diffguard.serving.app")

T = TypeVar("T")


class Service:
    """A detector that is being opened, is ready, or failed to open, and the queue of images for it.

    Args:
        source: a detector, or a function that opens one.
        limits: of a request.
        max_waiting: most images that wait in the queue.
        seconds: time-out of a request; a model that takes longer counts as failed.
        on_failure: called with the error if the detector cannot be opened.
        on_ready: called with the detector before the first request is answered.
    """

    def __init__(
        self,
        source: DeployedDetector | Callable[[], DeployedDetector],
        limits: Limits,
        max_waiting: int,
        seconds: float,
        on_failure: Callable[[BaseException], None],
        on_ready: Callable[[DeployedDetector], None] = lambda detector: None,
    ) -> None:
        self.limits, self.seconds = limits, seconds
        self.detector: DeployedDetector | None = None
        self.failure: str | None = None
        self._source, self._max_waiting = source, max_waiting
        self._on_failure, self._on_ready = on_failure, on_ready
        self._batcher: Batcher[Tensor, Decision] | None = None
        # Decoding is bound by the processor: more threads than cores would only take memory.
        self._readers = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "read")
        self._opener = threading.Thread(target=self._open, name="open", daemon=True)

    def start(self) -> None:
        """Open the detector in the background."""
        self._opener.start()

    def close(self) -> None:
        """Answer the queued requests, and end the threads."""
        if self._batcher is not None:
            self._batcher.close(self.seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting_images(self) -> int:
        """Images in the queue."""
        return 0 if self._batcher is None else self._batcher.waiting_images

    def ready(self) -> tuple[DeployedDetector, Batcher[Tensor, Decision]]:
        """Return the detector and its queue.

        Raises:
            HTTPException: 503, the detector is still being opened, or failed to open.
        """
        if self.failure is not None:
            raise HTTPException(503, self.failure)
        if self.detector is None or self._batcher is None:
            raise try_again("the detector is still being loaded; try again in a second")
        return self.detector, self._batcher

    async def read(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a function that decodes or encodes in a thread, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(work, *arguments))

    def check_room(self, images: int) -> None:
        """Check that the queue has room for so many images of a request.

        Raises:
            HTTPException: 503, the queue is full.
        """
        _, batcher = self.ready()
        try:
            batcher.check_room(images)
        except BusyError:
            raise _full() from None

    async def decide(self, images: Sequence[Tensor], reconstructions: bool) -> list[Decision]:
        """Decide on images [C, H, W], in one batch with those of concurrent requests.

        Raises:
            HTTPException: 503, the queue is full.
        """
        _, batcher = self.ready()
        try:
            answers = batcher.submit(images, reconstructions)
        except BusyError:
            raise _full() from None
        return await asyncio.wrap_future(answers)

    async def check(self) -> None:
        """Check that the model answers.

        Raises:
            HTTPException: 503, it does not; the detail says why.
        """
        detector, batcher = self.ready()
        if batcher.busy_seconds > self.seconds:
            raise HTTPException(503, f"the model has not answered for {batcher.busy_seconds:.0f} seconds")
        age = batcher.answered_seconds_ago
        if age is not None and (age < FRESH_SECONDS or batcher.busy_seconds > 0):
            return
        try:
            async with asyncio.timeout(self.seconds):
                await self.decide([detector.prepare(detector.example)], False)
        except TimeoutError:
            raise HTTPException(503, f"the model has not answered for {self.seconds:g} seconds") from None
        except HTTPException:
            raise
        except Exception as error:
            LOG.error("the model failed on the bundle's example image", exc_info=error)
            raise HTTPException(503, "the model failed; see the server's log") from None

    def _open(self) -> None:
        try:
            detector = self._source if isinstance(self._source, DeployedDetector) else self._source()
            batcher: Batcher[Tensor, Decision] = Batcher(
                partial(_decide, detector),
                self.limits.max_images,
                self._max_waiting,
                size_of=lambda image: image.nbytes,
                seconds=self.seconds,
            )
            # Checks and warms up the model before the first request; every member, since a cascade may skip some.
            example = detector.prepare(detector.example)
            detector.member_scores(example[None])
            batcher.submit([example], False).result()
            self._on_ready(detector)
        except BaseException as error:
            self.failure = "the detector could not be loaded; see the server's log"
            # A DiffGuardError says in one line what to do; a traceback would hide it.
            LOG.error("%s", error, exc_info=None if isinstance(error, DiffGuardError) else error)
            self._on_failure(error)
            return
        self.detector, self._batcher = detector, batcher
        LOG.info("ready: %s of benchmark %s", detector.info.detector, detector.info.benchmark)


def _decide(detector: DeployedDetector, images: Sequence[Tensor], reconstructions: bool) -> list[Decision]:
    return detector.decide(torch.stack(list(images)), reconstructions=reconstructions)


def try_again(detail: str) -> HTTPException:
    return HTTPException(503, detail, {"Retry-After": str(RETRY_SECONDS)})


def _full() -> HTTPException:
    return try_again("too many images wait; try again in a second")
