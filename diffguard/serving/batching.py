"""Micro-batches: the images of concurrent requests are decided in one call of the model.

One thread calls the model. Requests that arrive during a call are queued, and the next call takes as many of them as
fit into a batch: a single request is decided without delay, many at the speed of full batches.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from diffguard.serving.limits import MAX_WAITING_BYTES

Image = TypeVar("Image")
Answer = TypeVar("Answer")

_RATES = 16
"""Last calls of half a batch or more by which the model's speed is known: smaller ones say little of it."""


class BusyError(Exception):
    """The queue is full or closed."""


@dataclass(frozen=True, eq=False)
class _Job(Generic[Image, Answer]):
    images: Sequence[Image]
    reconstructions: bool
    bytes: int
    answers: "Future[list[Answer]]" = field(default_factory=Future)


class Batcher(Generic[Image, Answer]):
    """A bounded queue of requests, and the thread that answers them.

    The oldest request is in the next call. The queue is full at a number of images, at their bytes, or, beyond a
    batch, where the model, as fast as in the fastest of its last calls, could not decide on all of them in time.

    Args:
        decide: takes images, and whether reconstructions are wanted; returns an answer for each image, in order.
            Only one thread calls it.
        max_batch: most images of one call; a single request with more images is decided in one call all the same.
        max_waiting: most images in the queue.
        max_bytes: most bytes of images in the queue.
        size_of: bytes of an image.
        seconds: after which nobody waits for an answer any more.
    """

    def __init__(
        self,
        decide: Callable[[Sequence[Image], bool], list[Answer]],
        max_batch: int,
        max_waiting: int,
        *,
        max_bytes: int = MAX_WAITING_BYTES,
        size_of: Callable[[Image], int] = sys.getsizeof,
        seconds: float = math.inf,
    ) -> None:
        self._decide, self._max_batch, self._max_waiting = decide, max_batch, max_waiting
        self._max_bytes, self._size_of, self._seconds = max_bytes, size_of, seconds
        self._waiting: deque[_Job[Image, Answer]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._busy_since: float | None = None
        self._answered_at: float | None = None
        self._rates: deque[float] = deque(maxlen=_RATES)
        self._thread = threading.Thread(target=self._work, name="decide", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[Image], reconstructions: bool) -> "Future[list[Answer]]":
        """Queue the images of a request; if its future is cancelled in the queue, they are never decided.

        Raises:
            BusyError: the queue is full or closed.
        """
        job: _Job[Image, Answer] = _Job(images, reconstructions, sum(map(self._size_of, images)))
        with self._changed:
            self._check_room(len(images), job.bytes)
            self._waiting.append(job)
            self._changed.notify()
        return job.answers

    def check_room(self, images: int) -> None:
        """Check that the queue has room for so many images of a request, before they are decoded.

        Raises:
            BusyError: it is full or closed.
        """
        with self._changed:
            self._check_room(images, 0)

    def _check_room(self, images: int, size: int) -> None:
        waiting = [job for job in self._waiting if not job.answers.cancelled()]
        if waiting:
            images += sum(len(job.images) for job in waiting)
            size += sum(job.bytes for job in waiting)
        # A batch may always wait: its call says how fast the model is by now.
        in_time = max(self._max_batch, self._seconds * max(self._rates, default=math.inf))
        is_full = images > min(self._max_waiting, in_time) or size > self._max_bytes
        if self._is_closed or (waiting and is_full):  # an empty queue takes any request
            raise BusyError

    def close(self, seconds: float) -> None:
        """Refuse new requests, and wait up to this time for those that are queued."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def waiting_images(self) -> int:
        """Images of all requests in the queue."""
        with self._changed:
            return sum(len(job.images) for job in self._waiting if not job.answers.cancelled())

    @property
    def answered_seconds_ago(self) -> float | None:
        """Seconds since the model last answered; None if it never did, or if its last call failed."""
        answered_at = self._answered_at
        return None if answered_at is None else time.monotonic() - answered_at

    @property
    def busy_seconds(self) -> float:
        """Seconds since the current call of the model began; 0 if there is none."""
        busy_since = self._busy_since
        return 0.0 if busy_since is None else time.monotonic() - busy_since

    def _work(self) -> None:
        while jobs := self._next():
            self._busy_since = time.monotonic()
            if not self._answer(jobs) and len(jobs) > 1:
                # Each by itself, so that one request's failure is not the others'.
                for job in jobs:
                    self._answer([job], is_last_try=True)
            self._busy_since = None

    def _next(self) -> list[_Job[Image, Answer]]:
        """Wait for requests, and take those that fit into one batch, in order; an empty list once all is done."""
        with self._changed:
            while True:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                batch = self._take()
                if batch or (not self._waiting and self._is_closed):
                    return batch

    def _take(self) -> list[_Job[Image, Answer]]:
        batch: list[_Job[Image, Answer]] = []
        remaining: deque[_Job[Image, Answer]] = deque()
        size = 0
        for job in self._waiting:
            fits = not batch or (
                job.reconstructions == batch[0].reconstructions and size + len(job.images) <= self._max_batch
            )
            if not fits:
                remaining.append(job)
            elif job.answers.set_running_or_notify_cancel():
                batch.append(job)
                size += len(job.images)
        self._waiting = remaining
        return batch

    def _answer(self, jobs: list[_Job[Image, Answer]], is_last_try: bool = False) -> bool:
        images = [image for job in jobs for image in job.images]
        start_time = time.monotonic()
        try:
            answers = self._decide(images, jobs[0].reconstructions)
            if len(answers) != len(images):
                raise RuntimeError(f"{len(answers)} answers for {len(images)} images")
        except Exception as error:  # passed on to the requests, so that the thread survives it
            self._answered_at = None
            if len(jobs) == 1 or is_last_try:
                for job in jobs:
                    job.answers.set_exception(error)
            return False
        self._answered_at = time.monotonic()
        if 2 * len(images) >= self._max_batch:
            self._rates.append(len(images) / max(self._answered_at - start_time, 1e-9))
        start = 0
        for job in jobs:
            job.answers.set_result(answers[start : start + len(job.images)])
            start += len(job.images)
        return True
