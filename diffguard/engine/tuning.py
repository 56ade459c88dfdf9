"""How the network is called fastest on this device: images in a call, layout of memory, denormals. By measurement."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffguard.models.denoisers.base import Denoiser, HasLayout, in_precision, may_be_channels_last, networks_of
from diffguard.utils.precision import resolve_precision
from diffguard.utils.processor import flushed_denormals, one_thread

LOG = logging.getLogger(__name__)

GAIN = 1.03
"""How much faster another size, layout or treatment of denormals has to be; less is noise."""

WORTH_THREADS = 1.3
"""How much faster several threads have to be than one, which no other program can stall."""


@dataclass(frozen=True)
class Tuning:
    """How a network is called.

    Attributes:
        slots: evaluations in a call.
        channels_last: whether the weights are laid out channels-last; None: the denoiser does not let one choose.
        flushes_denormals: whether denormal numbers are flushed to zero.
        rate: evaluations a second that were measured, by one thread on a processor.
        precision: that it was measured in.
    """

    slots: int
    channels_last: bool | None
    flushes_denormals: bool
    rate: float
    precision: str

    def __str__(self) -> str:
        layout = {None: "as they are", True: "channels-last", False: "contiguous"}[self.channels_last]
        denormals = "flushed" if self.flushes_denormals else "kept"
        return (
            f"{self.slots} evaluations a call in {self.precision}, weights {layout}, denormals {denormals}: "
            f"{self.rate:.3g} evaluations/s"
        )


@torch.no_grad()
def tune(
    denoiser: Denoiser,
    precision: str = "auto",
    *,
    slots: int | None = None,
    largest: int = 256,
    seconds: float = 2.0,
) -> Tuning:
    """Choose how a network is called by a short measurement, and lay its weights out that way.

    Sizes double until the rate has not grown by 3 % twice, memory ends, or the time is up; of sizes that are about as
    fast, the smallest. At that size the other layout and flushed denormals are tried. On a processor one thread
    measures, since that is how `diffguard.engine.EngineProcesses` calls it, and time is its own: what other programs
    take of its core does not count. What was chosen is logged.

    Args:
        precision: a variant's; see `diffguard.settings.Variant`.
        slots: evaluations in a call; None: measured.
        largest: most evaluations in a call.
        seconds: that the choice of the size may take; the rest is three calls each.
    """
    precision = resolve_precision(precision, denoiser.device)
    meter = _Meter(denoiser, precision, own_time=True)
    channels_last = _is_channels_last(denoiser)
    if channels_last and not may_be_channels_last(denoiser):
        channels_last = False
        meter.lay_out(channels_last)
    with one_thread(denoiser.device), flushed_denormals(denoiser.device, False):
        size, rate = (slots, meter.rate(slots)) if slots is not None else _pick_size(meter, largest, seconds)
        if channels_last is not None and may_be_channels_last(denoiser):
            other = meter.rate(size, channels_last=not channels_last)
            if other > GAIN * rate:
                channels_last, rate = not channels_last, other
            else:
                meter.lay_out(channels_last)
        flushes = False
        if denoiser.device.type == "cpu":
            with flushed_denormals(denoiser.device):
                flushed_rate = meter.rate(size)
            if flushed_rate > GAIN * rate:
                flushes, rate = True, flushed_rate
    tuning = Tuning(size, channels_last, flushes, rate, precision)
    LOG.info("network: %s", tuning)
    return tuning


@torch.no_grad()
def pick_threads(denoiser: Denoiser, tuning: Tuning) -> int:
    """In how many threads one image is evaluated fastest in this process: one, or as many as there are.

    Threads wait for each other at every layer, which a small network does not repay.
    """
    threads, meter = torch.get_num_threads(), _Meter(denoiser, tuning.precision)
    if denoiser.device.type != "cpu" or threads == 1:
        return threads
    together = meter.rate(1)
    with one_thread(denoiser.device):
        alone = meter.rate(1)
    return threads if together > WORTH_THREADS * alone else 1


@torch.no_grad()
def warm_up(denoiser: Denoiser, tuning: Tuning) -> None:
    """Evaluate the network once in a call of full size, which takes its memory and prepares its kernels."""
    _Meter(denoiser, tuning.precision).call(tuning.slots)


def _pick_size(meter: "_Meter", largest: int, seconds: float) -> tuple[int, float]:
    """The smallest of the fastest sizes, and its rate."""
    deadline = meter.now() + seconds
    best_size, best_rate, not_faster, size = 1, 0.0, 0, 1
    while size <= largest and not_faster < 2 and meter.now() < deadline:
        try:
            rate = meter.rate(size, deadline)
        except torch.OutOfMemoryError:
            break
        not_faster = 0 if rate > GAIN * best_rate else not_faster + 1
        best_size, best_rate = (size, rate) if rate > GAIN * best_rate else (best_size, best_rate)
        size *= 2
    return best_size, best_rate


class _Meter:
    """Measures a network under different sizes and layouts.

    Args:
        own_time: on a processor count the calling thread's time alone; for calls in one thread.
    """

    def __init__(self, denoiser: Denoiser, precision: str, *, own_time: bool = False) -> None:
        self._denoiser, self._called = denoiser, in_precision(denoiser, precision)
        self.now = time.thread_time if own_time and denoiser.device.type == "cpu" else time.perf_counter
        # Noise, since images of one value are where denormal numbers and shortcuts are.
        image = torch.rand(1, *denoiser.image_shape, generator=torch.Generator().manual_seed(0))
        self._latents: Tensor = denoiser.encode(image.to(denoiser.device))

    def rate(self, size: int, deadline: float = float("inf"), *, channels_last: bool | None = None) -> float:
        """Evaluations a second in calls of a size; the best of at most three, after one that prepares."""
        if channels_last is not None:
            self.lay_out(channels_last)
        times = []
        for _ in range(4):
            started = self.now()
            self.call(size)
            times.append(self.now() - started)
            if self.now() > deadline:
                break
        return size / min(times)

    def call(self, size: int) -> None:
        """Evaluate so many in one call, and wait for it."""
        x = self._latents.expand(size, *self._latents.shape[1:]).contiguous()
        zeros = torch.zeros(size, dtype=torch.long, device=x.device)
        self._called.eps(x, zeros, zeros).sum().item()

    def lay_out(self, channels_last: bool) -> None:
        """Lay the weights out."""
        denoiser: Any = self._denoiser
        denoiser.lay_out(torch.channels_last if channels_last else torch.contiguous_format)


def _is_channels_last(denoiser: Denoiser) -> bool | None:
    """Whether its weights are laid out channels-last; None: one cannot choose, or there is nothing to lay out."""
    parameters = [weight for network in networks_of(denoiser).values() for weight in network.parameters()]
    weights = [weight for weight in parameters if weight.dim() == 4 and min(weight.shape[1:]) > 1]
    if not weights or not isinstance(denoiser, HasLayout):
        return None
    return not weights[0].is_contiguous()
