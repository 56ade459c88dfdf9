"""The devices of this machine, and exclusive use of one."""

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
    """Lease a device of this machine for exclusive use; waits until one is free."""
    with _leasing:
        if not _known:
            _known.extend(devices())
            for device in _known:
                _idle.put(device)
    device = _idle.get()
    try:
        yield device
    finally:
        _idle.put(device)
