"""The devices of this machine, and a device to oneself."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from threading import Lock

import torch


def devices() -> list[str]:
    """The devices of this machine that score: its GPUs, or its processor."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


_idle: Queue[str] = Queue()
_known: list[str] = []
_leasing = Lock()


@contextmanager
def leased_device() -> Iterator[str]:
    """A device of this machine to oneself; waits while others have them all."""
    with _leasing:
        if not _known:
            _known.extend(devices())
            for each in _known:
                _idle.put(each)
    device = _idle.get()
    try:
        yield device
    finally:
        _idle.put(device)
