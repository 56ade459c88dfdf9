"""The loop that trains classifiers and denoisers: batches, precision, learning rate, checkpoints."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.settings import Training
from diffguard.training.augmentation import augment
from diffguard.training.checkpoints import read_checkpoint, write_checkpoint
from diffguard.training.optimizers import make_optimizer
from diffguard.training.rates import one_cycle, warmup_stable_decay
from diffguard.utils.precision import resolve_precision

PREVIEW_SHARE = 0.05
"""Of a training's time, what previews take at most."""


@dataclass(frozen=True)
class TrainingStep:
    """How a training goes.

    Attributes:
        step: steps of the optimizer that are done.
        steps: in all, if time does not end it before.
        images_seen: that were trained on, each as often as it was.
        loss, gradient_norm: means over the steps since the last report; the norm is that before clipping.
        learning_rate: of the last step.
        images_per_second: since the last report, checkpoints and previews aside.
    """

    step: int
    steps: int
    images_seen: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images_per_second: float


Progress = Callable[[TrainingStep], None]
"""Called after each step, on a GPU about once a second; always after the first and the last step of a call."""

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Of images [B, C, H, W] in [0, 1], augmented, and their labels [B]: what is minimized."""


class Trainer:
    """A network at training, and all that has to be kept to go on with it.

    Args:
        network: on the CPU; it is moved.
        loss: what it is trained on; called under autocast.
        images: [N, C, H, W] in [0, 1], or uint8.
        labels: int64 [N].
        steps: of the optimizer, in all.
        of: plain values that a checkpoint of this training has to agree with, beside settings, seed and images.
        finish_minutes: bring the learning rate down over so many minutes from where the training is, and end.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        images: Tensor,
        labels: Tensor,
        settings: Training,
        steps: int,
        seed: int,
        device: torch.device | str,
        of: dict[str, Any],
        finish_minutes: float | None = None,
    ) -> None:
        self.settings, self.loss, self.device = settings, loss, torch.device(device)
        self.precision = resolve_precision(settings.precision, self.device)
        self.begun_with = {"settings": settings.identity(), "seed": seed, "images": list(images.shape), **of}
        self.seed = seed
        # Where there is room on a device of its own memory, images go there once.
        self.images, self.labels = _moved(images, labels, self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        network = network.requires_grad_(True).to(self.device)
        self.network = network.to(memory_format=memory_format(self.device)).train()
        self.average: nn.Module | None = deepcopy(self.network).requires_grad_(False).eval() if settings.ema else None
        self.weights: list[Tensor] = list(self.network.parameters())
        self.averaged: list[Tensor] = [] if self.average is None else list(self.average.parameters())
        self.optimizer = make_optimizer(settings.optimizer, self.network, settings.learning_rate, settings.weight_decay)
        self.batches = Batches(len(images), settings.batch_size, self.generator)
        self.clock = Clock(steps, settings.minutes, finish_minutes)

    def run(
        self, progress: Progress, checkpoint: Path | None = None, preview: Callable[[int], None] = lambda step: None
    ) -> None:
        """Train until the steps or the time are done.

        An interrupt or a request to terminate is answered between two steps, once the checkpoint is written.

        Args:
            checkpoint: a file that is written as training goes; where it is there, training goes on from it. It is
                left in place at the end.
            preview: called with the steps done after a checkpoint, as often as `PREVIEW_SHARE` lets it, and at the end.

        Raises:
            DataError: the checkpoint is damaged, or of another training.
            SettingError: the loss is not finite.
        """
        if checkpoint is not None and checkpoint.is_file():
            self._restore(read_checkpoint(checkpoint, self.begun_with))
        saved, previewed, preview_took = self.clock.seconds, self.clock.seconds, 0.0
        report, stopped = _Report(self, progress), False
        with _flushed_denormals(self.device), _postponed_signals() as asked_to_stop:
            while self.clock.done < 1 and not stopped:
                report.add(*self._step())
                stopped, now = asked_to_stop(), self.clock.seconds
                if checkpoint is None or not (stopped or now - saved >= 60 * self.settings.checkpoint_minutes):
                    continue
                report.send()
                write_checkpoint(checkpoint, self._state())
                if not stopped and preview_took <= PREVIEW_SHARE * (now - previewed):
                    began = time.monotonic()
                    preview(self.clock.step)
                    previewed, preview_took = now, time.monotonic() - began
                saved = now
                report.restart()
        if stopped:
            raise KeyboardInterrupt  # where a handler of the signal did not
        report.send()
        if checkpoint is not None:
            write_checkpoint(checkpoint, self._state())
        preview(self.clock.step)

    def best(self) -> nn.Module:
        """The network so far on the CPU, in eval mode: with the averaged weights if there are any."""
        network = deepcopy(self.network).to("cpu")
        if self.average is not None:  # the rest, as statistics of batch normalization, is averaged by itself
            network.load_state_dict(dict(self.average.named_parameters()), strict=False)
        network.to(memory_format=torch.contiguous_format)
        return network.eval().requires_grad_(False)

    def _step(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; returns its loss and the norm of its gradient, on the device."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        rows = self.batches.next()
        where = rows.to(self.images.device)
        images = as_floats(self.images[where].to(self.device))
        images = augment(images, settings.augmentation, self.generator)
        labels = self.labels[where].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.loss(images, labels, self.generator)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.weights, settings.gradient_clip or math.inf)
        self.optimizer.step()
        self.clock.step += 1
        if self.averaged:
            # A short training would otherwise end with weights that still remember the first ones.
            decay = min(settings.ema, self.clock.step / (self.clock.step + 10))
            torch._foreach_lerp_(self.averaged, [weight.detach() for weight in self.weights], 1 - decay)
        return loss.detach(), norm

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        settings, clock = self.settings, self.clock
        if settings.rate_schedule == "one-cycle":
            factor = one_cycle(clock.done, settings.warmup_fraction)
        else:
            factor = warmup_stable_decay(clock.step, settings.warmup_steps, clock.decayed(settings.decay_fraction))
        return settings.learning_rate * factor

    def _state(self) -> dict[str, Any]:
        return {
            "begun_with": self.begun_with,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "device": self.device.type,
            "generator": self.generator.get_state(),
            "order": self.batches.order,
            "position": self.batches.position,
            "clock": self.clock.state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clock.restore(state["clock"])
        if state["device"] == self.device.type:
            self.generator.set_state(state["generator"])
        else:  # each kind of device has random numbers of its own
            self.generator.manual_seed(self.seed + self.clock.step)
        self.batches.order, self.batches.position = state["order"].to(self.device), state["position"]


class Batches:
    """Endless full batches of row numbers, each epoch in a new order."""

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.count, self.size, self.generator = count, min(size, count), generator
        self.order = torch.empty(0, dtype=torch.int64, device=generator.device)
        self.position = 0

    def next(self) -> Tensor:
        if self.position + self.size > len(self.order):
            device = self.generator.device
            self.order, self.position = torch.randperm(self.count, generator=self.generator, device=device), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]


class Clock:
    """How much of a training is done: of its steps, or of its time if that is gone sooner.

    Args:
        steps: in all.
        minutes: a time budget; None: as long as it takes.
        finish_minutes: in place of both, end in so many minutes.
    """

    def __init__(self, steps: int, minutes: float | None, finish_minutes: float | None = None) -> None:
        self.steps, self.minutes, self.finish_minutes, self.step = steps, minutes, finish_minutes, 0
        self.finishing_since = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """That were spent on it, former runs included."""
        return time.monotonic() - self._started

    @property
    def done(self) -> float:
        """In [0, 1]; 1 at the end."""
        if self.finish_minutes is not None:
            return min(1.0, (self.seconds - self.finishing_since) / (60 * self.finish_minutes))
        spent = 0.0 if self.minutes is None else self.seconds / (60 * self.minutes)
        return min(1.0, max(self.step / self.steps, spent))

    def decayed(self, fraction: float) -> float:
        """The share that is done of the decay, which is this fraction of the training, its last, or all of finishing.

        In [0, 1]; 0 before it.
        """
        fraction = 1.0 if self.finish_minutes is not None else fraction
        return max(0.0, (self.done - (1 - fraction)) / fraction)

    def state(self) -> dict[str, Any]:
        since = None if self.finish_minutes is None else self.finishing_since
        return {"step": self.step, "seconds": self.seconds, "finishing_since": since}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self._started = state["step"], time.monotonic() - state["seconds"]
        since = state["finishing_since"]
        self.finishing_since = state["seconds"] if since is None else since


class _Report:
    """Collects what steps return, and reports it: on a GPU seldom, since reading a number waits for it."""

    def __init__(self, trainer: Trainer, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.interval = 0.0 if trainer.device.type == "cpu" else 1.0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.sent = False
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        if not self.sent or time.monotonic() - self.since >= self.interval:
            self.send()

    def send(self) -> None:
        """Report the steps since the last report, if there are any."""
        if not self.losses:
            return
        trainer, count = self.trainer, len(self.losses)
        loss, norm = float(torch.stack(self.losses).mean()), float(torch.stack(self.norms).mean())
        took = time.monotonic() - self.since
        step, rate = trainer.clock.step, trainer.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise SettingError(
                f"learning_rate: {trainer.settings.learning_rate:g} is too high: after {step} steps the loss is {loss}"
            )
        size = trainer.batches.size
        speed = count * size / max(took, 1e-9)
        self.progress(TrainingStep(step, trainer.clock.steps, step * size, loss, norm, rate, speed))
        self.losses, self.norms, self.sent = [], [], True
        self.restart()


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Channels-last where training is faster in it.

    On processors it is slower (136 against 149 images/s of cifar10-patch in bfloat16 with AMX, 567 against 672 of its
    prediction), and torch 2.13's corrupts memory with four channels and one thread.
    """
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def as_floats(images: Tensor) -> Tensor:
    """Images in [0, 1], of uint8 or already so."""
    return images if images.is_floating_point() else images.float() / 255


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """Make a network with weights of its own seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _moved(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
        return images.to(device), labels.to(device)
    return images, labels


@contextmanager
def _flushed_denormals(device: torch.device) -> Iterator[None]:
    """Numbers next to nothing count as nothing: a processor takes a hundred times as long for them."""
    kept = bool(torch.tensor(1e-40) * 1 == 0)
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(kept)


@contextmanager
def _postponed_signals() -> Iterator[Callable[[], bool]]:
    """Interrupts and requests to terminate are noted, and raised at the end; a second one is not postponed.

    Only the main thread of a process receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    former: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in former.items():
            signal.signal(each, handler)

    for asked in (signal.SIGINT, signal.SIGTERM):
        former[asked] = signal.signal(asked, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
