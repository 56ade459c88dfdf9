"""One process at a time, on this machine or on those that share a file system; a lock ends with its process."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from diffguard.errors import ServiceError
from tasks.common.files import write_json

POLL_SECONDS = 0.5


@contextmanager
def exclusive(lock: Path, what: str, holder: str, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock; if another process holds it, say once which one, and wait.

    Args:
        lock: the file that is locked; a note beside it says who holds it.
        what: is locked, as "data/digits".
        holder: this process' name for those that wait, as "flow run blue-fox".
        wait: or raise.

    Raises:
        ServiceError: another process holds it, and this one does not wait; the message says which.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    note, file, is_told = lock.with_suffix(".json"), FileLock(lock), False
    while True:
        try:
            file.acquire(timeout=0)
            break
        except Timeout:
            if not wait:
                raise ServiceError(f"{what} is in use by {_held_by(note)}") from None
            if not is_told:
                print(f"{what} is in use by {_held_by(note)}; waiting for it", flush=True)
                is_told = True
            time.sleep(POLL_SECONDS)  # in the lock's own wait no signal would be seen for long
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(note, {"holder": holder, "pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        note.unlink(missing_ok=True)
        file.release()


def _held_by(note: Path) -> str:
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        return f"{told['holder']} (process {told['pid']} on {told['host']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written
        return "another process"
