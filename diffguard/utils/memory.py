"""Work in parts that fit in a device's memory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
_log = logging.getLogger("diffguard")


@dataclass
class MemorySafeBatches:
    """How many images are worked on at once: as many as fit, found by trying.

    Attributes:
        size: the most of them; halved, for good, whenever memory ends.
        device: whose memory it is.
    """

    size: int
    device: torch.device

    def run(self, work: Callable[[list[T]], None], items: list[T]) -> None:
        """Work on items, as many at a time as the size is. Of a part that did not fit, work must leave nothing done.

        Raises:
            torch.OutOfMemoryError: one item alone does not fit.
        """
        done = 0
        while done < len(items):
            part, fits = items[done : done + self.size], True
            try:
                work(part)
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                fits = False
            if not fits:  # the failed attempt's memory is free only outside of its handler
                self.size = max(1, min(self.size, len(part)) // 2)
                _log.warning("out of memory on %s: from here on %d images a batch", self.device, self.size)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                done += len(part)
