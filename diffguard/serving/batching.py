"""Micro-batches: the images of requests that come at the same time are decided in one call.

One thread asks the model. While it works, requests gather; then it takes as many as fit, so that a lone
request never waits for company, and a crowd is decided at a full batch's speed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Image = TypeVar("Image")
Answer = TypeVar("Answer")


class BusyError(Exception):
    """More images wait already than the queue holds, or it is closing."""


@dataclass(frozen=True, eq=False)
class _Job(Generic[Image, Answer]):
    images: Sequence[Image]
    reconstructions: bool
    answers: "Future[list[Answer]]" = field(default_factory=Future)


class Batcher(Generic[Image, Answer]):
    """A bounded queue of requests, and the thread that answers them.

    Args:
        decide: answers of some images, in order; its second argument: with reconstructions. It is only
            ever called by one thread.
        max_batch: images of a call, but for a single request that has more.
        max_waiting: images that may wait.
    """

    def __init__(
        self, decide: Callable[[Sequence[Image], bool], list[Answer]], max_batch: int, max_waiting: int
    ) -> None:
        self._decide, self._max_batch, self._max_waiting = decide, max_batch, max_waiting
        self._waiting: deque[_Job[Image, Answer]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._busy_since: float | None = None
        self._answered_at: float | None = None
        self._thread = threading.Thread(target=self._work, name="decide", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[Image], reconstructions: bool) -> "Future[list[Answer]]":
        """Queue the images of a request; a future that is cancelled before its turn costs nothing.

        Raises:
            BusyError: the queue is full or closed.
        """
        job: _Job[Image, Answer] = _Job(images, reconstructions)
        with self._changed:
            waiting = sum(len(each.images) for each in self._waiting)
            if self._is_closed or (self._waiting and waiting + len(images) > self._max_waiting):
                raise BusyError
            self._waiting.append(job)
            self._changed.notify()
        return job.answers

    def close(self, seconds: float) -> None:
        """Take no more requests, and wait so long for those that are here."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def answered_seconds_ago(self) -> float | None:
        """Since the model last answered; None: never, or the last call failed."""
        at = self._answered_at
        return None if at is None else time.monotonic() - at

    @property
    def busy_seconds(self) -> float:
        """How long the present call takes already; 0: there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _work(self) -> None:
        while jobs := self._next():
            self._busy_since = time.monotonic()
            if not self._answer(jobs) and len(jobs) > 1:
                # One request's trouble is not the others': each by itself.
                for job in jobs:
                    self._answer([job], is_last_try=True)
            self._busy_since = None

    def _next(self) -> list[_Job[Image, Answer]]:
        """Waiting requests of one kind, in order, that fit into a batch; none at the end."""
        with self._changed:
            while True:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                taken = self._take()
                if taken or (not self._waiting and self._is_closed):
                    return taken

    def _take(self) -> list[_Job[Image, Answer]]:
        taken: list[_Job[Image, Answer]] = []
        left: deque[_Job[Image, Answer]] = deque()
        size = 0
        for job in self._waiting:
            fits = not taken or (
                job.reconstructions == taken[0].reconstructions and size + len(job.images) <= self._max_batch
            )
            if not fits:
                left.append(job)
            elif job.answers.set_running_or_notify_cancel():
                taken.append(job)
                size += len(job.images)
        self._waiting = left
        return taken

    def _answer(self, jobs: list[_Job[Image, Answer]], is_last_try: bool = False) -> bool:
        images = [image for job in jobs for image in job.images]
        try:
            answers = self._decide(images, jobs[0].reconstructions)
            if len(answers) != len(images):
                raise RuntimeError(f"{len(answers)} answers for {len(images)} images")
        except Exception as error:  # it is the requests' answer, and the thread goes on
            self._answered_at = None
            if len(jobs) == 1 or is_last_try:
                for job in jobs:
                    job.answers.set_exception(error)
            return False
        self._answered_at = time.monotonic()
        start = 0
        for job in jobs:
            job.answers.set_result(answers[start : start + len(job.images)])
            start += len(job.images)
        return True
