"""Ending work early: in other threads of this process, and in processes below it."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock, get_ident

import psutil

_interruptible: set[int] = set()
_lock = Lock()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let `interrupt_threads` end what this thread does here."""
    thread = get_ident()
    with _lock:
        _interruptible.add(thread)
    try:
        yield
    finally:
        with _lock:
            _interruptible.discard(thread)


def interrupt_threads() -> None:
    """Raise KeyboardInterrupt in every thread that is `interruptible`, as Ctrl-C does in the main one.

    A thread gets it before its next line of Python: one that waits for a lock, a file or a process, when that is over.
    """
    with _lock:
        for thread in _interruptible:
            # The one way that Python has; Prefect ends a task that exceeds its time-out by it, too.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


def end_processes(processes: Sequence[psutil.Process], seconds: float) -> None:
    """End processes: they are asked to (SIGTERM), and killed after so many seconds."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def end_tree(pid: int, seconds: float) -> None:
    """End a process and all below it; see `end_processes`."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        end_processes([parent, *parent.children(recursive=True)], seconds)
