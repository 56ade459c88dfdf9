"""Out-of-memory-safe batches."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
_log = logging.getLogger("diffguard")


@dataclass
class MemorySafeBatches:
    """Processes items in batches that fit into a device's memory; the batch size is found by trial.

    Attributes:
        size: largest batch; halved, for good, whenever the device runs out of memory.
        device: the device.
    """

    size: int
    device: torch.device

    def run(self, work: Callable[[list[T]], None], items: list[T]) -> None:
        """Call work on batches of items, in order; a batch that does not fit is tried again in smaller ones.

        Args:
            work: must have no effect if it raises torch.OutOfMemoryError.

        Raises:
            torch.OutOfMemoryError: a single item does not fit.
        """
        done = 0
        while done < len(items):
            batch, fits = items[done : done + self.size], True
            try:
                work(batch)
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                fits = False
            if not fits:  # outside of the handler, whose exception keeps the memory of the failed attempt
                self.size = max(1, min(self.size, len(batch)) // 2)
                _log.warning("out of memory on %s: from here on %d images a batch", self.device, self.size)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                done += len(batch)
