"""How torch uses the processor: its threads, and numbers too small for full precision."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def channels_last_corrupts(weights: Iterable[Tensor]) -> bool:
    """Whether a network of these weights, laid out channels-last, corrupts memory on a processor.

    In torch 2.13 a convolution with four channels does, with one thread.
    """
    return any(weight.dim() == 4 and 4 in weight.shape[:2] for weight in weights)


@contextmanager
def flushed_denormals(device: torch.device, flushes: bool = True) -> Iterator[None]:
    """Flush denormal numbers of this thread to zero on a processor, which is about a hundred times slower with them.

    Args:
        flushes: False keeps them.
    """
    was_flushed = bool(torch.tensor(1e-40) * 1 == 0)
    if device.type == "cpu":
        torch.set_flush_denormal(flushes)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushed)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute in one thread on a processor; elsewhere nothing changes."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
