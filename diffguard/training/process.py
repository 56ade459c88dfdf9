"""The process during a training: signals are postponed."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def postponed_signals() -> Iterator[Callable[[], bool]]:
    """Postpone SIGINT and SIGTERM to the end of the block; a second one is not postponed.

    Yields a function that returns whether one was received.

    Without effect outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other, handler in handlers.items():
            signal.signal(other, handler)

    for caught in (signal.SIGINT, signal.SIGTERM):
        handlers[caught] = signal.signal(caught, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
