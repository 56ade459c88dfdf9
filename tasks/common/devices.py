"""The devices of this machine, and exclusive use of one."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Lock

import torch
from filelock import FileLock, Timeout

POLL_SECONDS = 0.5


def devices() -> list[str]:
    """The devices of this machine that score: its GPUs, or its processor."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


_idle: Queue[str] = Queue()
_known: list[str] = []
_leasing = Lock()


@contextmanager
def leased_device() -> Iterator[str]:
    """Lease a device of this machine for exclusive use; waits until one is free.

    Exclusive among the tasks of this process and, if it is a GPU, of this user's processes. A processor may be shared:
    two runs on it are slow, and disturb each other in nothing else.
    """
    with _leasing:
        if not _known:
            _known.extend(devices())
            for device in _known:
                _idle.put(device)
    is_told = False
    while True:
        # In turn, since another process may have the first one for hours.
        device = _idle.get()
        lock = _lock(device)
        try:
            if lock is not None:
                lock.acquire(timeout=0)
            break
        except Timeout:
            _idle.put(device)
            if not is_told:
                print(f"{device} is in use by another process; waiting for a device", flush=True)
                is_told = True
            time.sleep(POLL_SECONDS)
    try:
        yield device
    finally:
        if lock is not None:
            lock.release()
        _idle.put(device)


def _lock(device: str) -> FileLock | None:
    """The lock of a GPU, by its own identity: a number may mean another GPU in another process."""
    if device == "cpu":
        return None
    folder = Path(tempfile.gettempdir()) / f"diffguard-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return FileLock(folder / f"{torch.cuda.get_device_properties(device).uuid}.lock", thread_local=False)
