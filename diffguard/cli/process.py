"""The process of a command: quick to start, and quick to end.

PyTorch, Diffusers and what they import are a million objects. Of a command on one image, searching them for garbage
while they are imported would take a sixth of the time, and freeing them one by one at the end a fifth.
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage meanwhile, and never search later what was made meanwhile: for imports, and opening models."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else extension modules report what is not freed at the end as leaked
        if enabled:
            gc.enable()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """If the body ends by `sys.exit`, let the process end without freeing its objects: the system frees their memory.

    Threads are still waited for, and exit functions called: that of this one is registered before all others, so that
    it is called after them.
    """
    status: list[int] = []

    def end() -> None:
        if not status:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return  # the interpreter reports it, as it would have
        os._exit(status[0])

    atexit.register(end)
    try:
        yield
    except SystemExit as stop:
        # As the interpreter does: a text is printed, and means 1.
        status.append(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
