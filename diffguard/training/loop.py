"""The training loop of classifiers and denoisers: batches, precision, learning rate, checkpoints."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffguard.errors import SettingError
from diffguard.settings import Training
from diffguard.training.augmentation import augment
from diffguard.training.checkpoints import read_checkpoint, write_checkpoint
from diffguard.training.clock import Clock
from diffguard.training.optimizers import make_optimizer
from diffguard.training.process import postponed_signals
from diffguard.training.rates import one_cycle, warmup_stable_decay
from diffguard.utils.precision import resolve_precision
from diffguard.utils.processor import flushed_denormals, one_thread

CHECKPOINT_MINUTES, CHECKPOINT_SHARE = 0.5, 0.05
"""Between checkpoints, and the largest share of the training time that writing them may take, unless settings say."""

PREVIEW_SHARE = 0.05
"""Largest share of the training time that previews may take."""


@dataclass(frozen=True)
class TrainingStep:
    """The state of a training.

    Attributes:
        step: number of optimizer steps done.
        steps: their total, unless a time budget ends training earlier.
        images_seen: number of images trained on, with repetitions.
        loss, gradient_norm: means over the steps since the last report; the norm is before clipping.
        learning_rate: of the last step.
        images_per_second: since the last report, without the time of checkpoints and previews.
    """

    step: int
    steps: int
    images_seen: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images_per_second: float


SMALL = 5e9
"""Floating-point operations of a forward pass of a batch, under which threads would wait for each other for longer than
they compute: a tenth of a second or less of one core."""

Progress = Callable[[TrainingStep], None]
"""Called after each step, on a GPU about once a second; always after the first and the last step of a run."""

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""The loss of augmented images [B, C, H, W] in [0, 1] and labels [B], a scalar; draws from the generator."""


class Trainer:
    """Trains a network; its state can be saved and resumed.

    Args:
        network: on the CPU; it is moved to the device.
        loss: called under autocast.
        images: [N, C, H, W] in [0, 1], or uint8.
        labels: int64 [N].
        steps: total number of optimizer steps.
        identity: plain values with which a checkpoint must agree, in addition to settings, seed and images.
        finish_minutes: time in which the learning rate decays, from the current step on, and training ends.
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
        identity: dict[str, Any],
        finish_minutes: float | None = None,
    ) -> None:
        self.settings, self.loss, self.device = settings, loss, torch.device(device)
        self.precision = resolve_precision(settings.precision, self.device)
        self.begun_with = {"settings": settings.identity(), "seed": seed, "images": list(images.shape), **identity}
        self.seed = seed
        # A GPU with enough memory holds all images, so that they are copied only once.
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

    @property
    def is_small(self) -> bool:
        """Whether a step is so little work that one thread of a processor does it as fast as several."""
        images, labels = as_floats(self.images[:1].to(self.device)), self.labels[:1].to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        self.network.eval()  # statistics of batches stay as they are
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.loss(images, labels, generator)
        self.network.train()
        return bool(self.batches.size * counter.get_total_flops() < SMALL)

    def run(
        self, progress: Progress, checkpoint: Path | None = None, preview: Callable[[int], None] = lambda step: None
    ) -> None:
        """Train until the steps or the time budget are used up.

        SIGINT and SIGTERM take effect between two steps, after the checkpoint is written.

        Args:
            checkpoint: a file that is written during training; if it exists, training resumes from it. It is kept at
                the end.
            preview: called with the number of steps done after a checkpoint, as often as `PREVIEW_SHARE` allows, and
                at the end.

        Raises:
            DataError: the checkpoint is damaged, or of another training.
            SettingError: the loss is not finite.
            KeyboardInterrupt: training was interrupted; the checkpoint is written.
        """
        if checkpoint is not None and checkpoint.is_file():
            self._restore(read_checkpoint(checkpoint, self.begun_with))
        saved, previewed, preview_took = self.clock.seconds, self.clock.seconds, 0.0
        spacing = 60 * (self.settings.checkpoint_minutes or CHECKPOINT_MINUTES)
        report, stopped = _Report(self, progress), False
        with ExitStack() as stack:
            is_interrupted = stack.enter_context(postponed_signals())
            stack.enter_context(flushed_denormals(self.device))
            if self.device.type == "cpu" and self.is_small:
                stack.enter_context(one_thread(self.device))
            while self.clock.done < 1 and not stopped:
                report.add(*self._step())
                stopped, now = is_interrupted(), self.clock.seconds
                if checkpoint is None or not (stopped or now - saved >= spacing):
                    continue
                report.send()
                start = time.monotonic()
                write_checkpoint(checkpoint, self._state())
                if self.settings.checkpoint_minutes is None:
                    spacing = max(spacing, (time.monotonic() - start) / CHECKPOINT_SHARE)
                if not stopped and preview_took <= PREVIEW_SHARE * (now - previewed):
                    start = time.monotonic()
                    preview(self.clock.step)
                    previewed, preview_took = now, time.monotonic() - start
                saved = now
                report.restart()
        if stopped:
            raise KeyboardInterrupt  # if the signal's own handler has not raised
        report.send()
        if checkpoint is not None:
            write_checkpoint(checkpoint, self._state())
        preview(self.clock.step)

    def best(self) -> nn.Module:
        """Return a copy of the network on the CPU, in eval mode, with the averaged weights if there are any."""
        network = deepcopy(self.network).to("cpu")
        if self.average is not None:  # parameters alone: batch norm's statistics are averages already
            network.load_state_dict(dict(self.average.named_parameters()), strict=False)
        network.to(memory_format=torch.contiguous_format)
        return network.eval().requires_grad_(False)

    def _step(self) -> tuple[Tensor, Tensor]:
        """Do one optimizer step; returns its loss and the norm of its gradient, on the device."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        rows = self.batches.next().to(self.images.device)
        images = as_floats(self.images[rows].to(self.device))
        images = augment(images, settings.augmentation, self.generator)
        labels = self.labels[rows].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.loss(images, labels, self.generator)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.weights, settings.gradient_clip or math.inf)
        self.optimizer.step()
        self.clock.step += 1
        if self.averaged:
            # Otherwise the average of a short training would still contain the initial weights.
            decay = min(settings.ema, self.clock.step / (self.clock.step + 10))
            torch._foreach_lerp_(self.averaged, [weight.detach() for weight in self.weights], 1 - decay)
        return loss.detach(), norm

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
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
        else:  # the generator's state cannot be moved to another kind of device
            self.generator.manual_seed(self.seed + self.clock.step)
        self.batches.order, self.batches.position = state["order"].to(self.device), state["position"]


class Batches:
    """An endless sequence of full batches of row indices, shuffled in each epoch."""

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.count, self.size, self.generator = count, min(size, count), generator
        self.order = torch.empty(0, dtype=torch.int64, device=generator.device)
        self.position = 0

    def next(self) -> Tensor:
        """Return the next batch, int64 [size], on the generator's device."""
        if self.position + self.size > len(self.order):
            device = self.generator.device
            self.order, self.position = torch.randperm(self.count, generator=self.generator, device=device), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]


class _Report:
    """Collects losses and norms of steps and reports them; on a GPU seldom, since reading them synchronizes."""

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
    """Return the memory format in which training is faster: channels-last on CUDA, else contiguous.

    On CPUs channels-last is slower (training of cifar10-patch in bfloat16 with AMX: 136 against 149 images/s;
    prediction: 567 against 672), and in torch 2.13 it corrupts memory with four channels and one thread.
    """
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def as_floats(images: Tensor) -> Tensor:
    """Convert images to floats in [0, 1]; those that are floats are returned as they are."""
    return images if images.is_floating_point() else images.float() / 255


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Build a network with initial weights of this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _moved(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
        return images.to(device), labels.to(device)
    return images, labels
