"""Engines side by side on a processor: a process a core, each of one thread.

Threads of one process share each network call, wait for each other at every layer, and stall whenever another program
has one of their cores. Processes of one thread each share nothing but the weights, which all map from one file.
"""

import logging
import math
import os
import pickle
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from loky import ProcessPoolExecutor, cpu_count, process_executor
from loky.backend import resource_tracker
from loky.process_executor import BrokenProcessPool

from diffguard.engine.cost import network_evaluations
from diffguard.engine.engine import Engine
from diffguard.engine.tuning import Tuning, warm_up
from diffguard.engine.types import Request, Sample, ScoreResult, Stats, check_request, resolved_request
from diffguard.errors import ServiceError
from diffguard.models.denoisers.base import Denoiser

LOG = logging.getLogger(__name__)

WORTH_SECONDS = 10.0
"""What one thread takes for it makes processes worth their start, of about three seconds."""

WAIT_SECONDS = 1.0
"""A thread that waits for the processes can be interrupted after, at most."""

CHUNK = 64
"""Images that a process is given at a time, at most: few, so that all processes end together."""


class EngineProcesses:
    """Scores images as an `Engine` does, in several processes of one thread each.

    The processes start at once, and load the models when they have their first images. Close it, or use it as a
    context.

    Args:
        denoiser, requests: see `Engine`; on a processor.
        tuning: how the network is called.
        processes: how many.
        executor: processes that were started ahead (`start_ahead`), as many; None: they are started now.

    Attributes:
        stats: what all processes together have cost so far.

    Raises:
        SettingError: see `Engine`.
        UnpicklableError: a model cannot be sent to another process.

    Example:
        >>> with EngineProcesses(denoiser, requests, tuning, processes=2) as engine:  # doctest: +SKIP
        ...     scores = {key: results[0].score for key, results in engine.run(samples)}
    """

    def __init__(
        self,
        denoiser: Denoiser,
        requests: Sequence[Request],
        tuning: Tuning,
        processes: int,
        executor: ProcessPoolExecutor | None = None,
    ) -> None:
        for request in requests:
            check_request(request, denoiser)
        self.stats = Stats()
        self.slots, self.processes = tuning.slots, processes
        folder = tempfile.TemporaryDirectory(prefix="diffguard-")
        resource_tracker.register(folder.name, "folder")  # which removes it, should this process be killed
        file = Path(folder.name) / "engine.pt"
        resolved = [resolved_request(request, denoiser.device) for request in requests]
        try:
            # By value where it was defined in the main program, which the processes do not run.
            torch.save((denoiser, resolved), file, pickle_module=cloudpickle)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            _remove(folder)
            raise UnpicklableError(str(error)) from error
        self._spec = _Spec(str(file), tuning)
        self._executor = _new_executor(processes) if executor is None else executor
        self._close = weakref.finalize(self, _close, self._executor, folder)

    def __enter__(self) -> "EngineProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._close()

    def start(self) -> None:
        """Start the processes and load the models there, so that the first images need not wait for it."""
        wait([self._executor.submit(_engine, self._spec) for _ in range(self.processes)])

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[Hashable, dict[int, ScoreResult]]]:
        """Score samples; see `Engine.run`. After an error, or if the iteration is abandoned, it is closed.

        Raises:
            DataError, SettingError: see `Engine.run`.
            ServiceError: a process was killed, perhaps since memory ended.
        """
        source = iter(samples)
        pending: set[Future[_Finished]] = set()
        is_finished = False
        try:
            while True:
                # Two for each process, so that none waits for the next one.
                while len(pending) <= self.processes and (chunks := self._next_chunks(source)):
                    pending |= {self._executor.submit(_score, self._spec, chunk) for chunk in chunks}
                if not pending:
                    break
                done: set[Future[_Finished]] = set()
                while not done:  # an exception that is sent to this thread comes between two waits
                    done, pending = wait(pending, WAIT_SECONDS, FIRST_COMPLETED)
                for future in done:
                    finished = future.result()
                    self.stats.add(finished.stats)
                    yield from finished.results
            is_finished = True
        except BrokenProcessPool:
            raise ServiceError(
                "a process that scores was killed, perhaps since memory ended; make room, or use fewer processes by "
                "OMP_NUM_THREADS"
            ) from None
        finally:
            if not is_finished:
                self.close()

    def _next_chunks(self, source: Iterator[Sample]) -> list[list[Sample]]:
        """The next images as a chunk for each process; the last ones in equal parts."""
        size = max(1, min(CHUNK, self.slots))
        window = list(islice(source, self.processes * size))
        size = -(-len(window) // self.processes)
        return [window[first : first + size] for first in range(0, len(window), size or 1)]


class UnpicklableError(Exception):
    """A model cannot be sent to another process."""


def start_ahead(processes: int) -> ProcessPoolExecutor:
    """Start processes that import what an engine needs, while this one is at something else; shut them down."""
    executor = _new_executor(processes)
    executor.submit(_import_networks)
    return executor


@contextmanager
def engine_for(
    denoiser: Denoiser,
    requests: Sequence[Request],
    tuning: Tuning,
    images: int,
    executor: ProcessPoolExecutor | None = None,
) -> Iterator[Engine | EngineProcesses]:
    """An engine for so many images: in several processes where that is faster (`open_processes`), else in this one.

    Args:
        executor: processes that were started ahead (`start_ahead`), a core each; they are shut down in any case.

    Raises:
        SettingError: see `Engine`.
    """
    processes = open_processes(denoiser, requests, tuning, images, executor=executor)
    if processes is None:
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)
        yield Engine(denoiser, requests, slots=tuning)
        return
    with processes:
        yield processes


def open_processes(
    denoiser: Denoiser,
    requests: Sequence[Request],
    tuning: Tuning,
    images: int,
    most: int | None = None,
    executor: ProcessPoolExecutor | None = None,
) -> EngineProcesses | None:
    """Processes for so many images; None where they are not worth it, or a model cannot be sent there.

    They are on a processor of more than one core (`core_count`), for more than a few seconds of work.

    Args:
        most: processes; None: a core each.
        executor: see `EngineProcesses`.

    Raises:
        SettingError: see `Engine`.
    """
    processes = min(core_count(), images, images if most is None else most)
    if denoiser.device.type != "cpu" or processes < 2 or not requests:
        return None
    if _seconds(denoiser, requests, tuning, images) < WORTH_SECONDS:
        return None
    try:
        engine = EngineProcesses(denoiser, requests, tuning, processes, executor)
    except UnpicklableError as error:
        LOG.warning("scoring in one process, since a model cannot be sent to others: %s", error)
        return None
    LOG.info("scoring in %d processes of one thread each", processes)
    return engine


def core_count() -> int:
    """How many cores this process may use: those that torch computes on (OMP_NUM_THREADS), within the machine's limits.

    Limits are the affinity of the process and the quota of its container.
    """
    return max(1, min(torch.get_num_threads(), int(cpu_count())))


def _seconds(denoiser: Denoiser, requests: Sequence[Request], tuning: Tuning, images: int) -> float:
    """What one thread takes at most, were no evaluation shared."""
    steps, labels, null_label = len(denoiser.alphas_cumprod), denoiser.num_labels, denoiser.null_label
    evaluations = sum(
        network_evaluations(request.variant, request.variant.max_level, steps, labels, null_label is not None)
        for request in requests
    )
    return images * evaluations / tuning.rate


@dataclass(frozen=True)
class _Spec:
    """An engine of a process: the file with its models, and how it calls the network."""

    file: str
    tuning: Tuning


@dataclass(frozen=True)
class _Finished:
    results: list[tuple[Hashable, dict[int, ScoreResult]]]
    stats: Stats


_engines: dict[_Spec, Engine] = {}
"""In a process of the pool: its engine."""


def _new_executor(processes: int) -> ProcessPoolExecutor:
    # Loky's processes do not import the main program, as those of multiprocessing do.
    return ProcessPoolExecutor(
        processes, timeout=None, initializer=_begin, initargs=(os.getpid(),), env={"OMP_NUM_THREADS": "1"}
    )


def _import_networks() -> None:
    """Import what most denoisers are made of; this module has imported the rest."""
    from diffusers import UNet2DModel  # noqa: F401


def _begin(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Loky restarts a process that has grown by more than this; an engine does, since calls of each size keep buffers.
    process_executor._MAX_MEMORY_LEAK_SIZE = math.inf
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _engine(spec: _Spec) -> None:
    """Make this process's engine, unless it is there."""
    if spec not in _engines:
        torch.set_num_threads(1)
        # Written by the parent a moment ago; mapped, so that processes share the weights' memory.
        denoiser, requests = torch.load(spec.file, mmap=True, weights_only=False)
        warm_up(denoiser, spec.tuning)
        _engines[spec] = Engine(denoiser, requests, slots=spec.tuning, fixed=False)


def _score(spec: _Spec, samples: list[Sample]) -> _Finished:
    _engine(spec)
    engine = _engines[spec]
    before = replace(engine.stats)
    try:
        results = list(engine.run(samples))
    except BaseException:
        del _engines[spec]  # images are still at work in it
        raise
    return _Finished(results, engine.stats.since(before))


def _close(executor: Any, folder: "tempfile.TemporaryDirectory[str]") -> None:
    executor.shutdown(wait=True, kill_workers=True)
    _remove(folder)


def _remove(folder: "tempfile.TemporaryDirectory[str]") -> None:
    folder.cleanup()
    resource_tracker.unregister(folder.name, "folder")
