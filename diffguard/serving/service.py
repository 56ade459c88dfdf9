"""The detector behind the endpoint: opened in the background, asked by one thread, and known to be well."""

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
from diffguard.serving.limits import Limits

LOG = logging.getLogger("diffguard.serving.app")
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
            raise try_again("the detector is still being loaded; try again in a second")
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
            raise try_again("too many images wait; try again in a second") from None
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
            batcher = Batcher(partial(decide, detector), self.limits.max_images, self._max_waiting)
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


def decide(detector: DeployedDetector, images: Sequence[Tensor], reconstructions: bool) -> list[Decision]:
    return detector.decide(torch.stack(list(images)), reconstructions=reconstructions)


def try_again(detail: str) -> HTTPException:
    return HTTPException(503, detail, {"Retry-After": "1"})
