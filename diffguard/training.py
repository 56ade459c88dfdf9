"""Training of classifiers and denoisers for one's own classes."""

import math
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.augmentation import augment
from diffguard.classifiers import ConvClassifier, ResidualClassifier
from diffguard.denoisers import PixelDenoiser, predict_padded
from diffguard.errors import DataError
from diffguard.settings import ClassifierTraining, DenoiserTraining

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss)."""

Preview = Callable[[int, PixelDenoiser], None]
"""Called with (steps done, the denoiser so far) at each checkpoint and at the end."""


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: ClassifierTraining,
    seed: int,
    progress: Progress,
    *,
    device: torch.device | str = "cpu",
) -> ConvClassifier | ResidualClassifier:
    """Train a `ConvClassifier`, or a `ResidualClassifier` where the settings give blocks.

    Args:
        images: [N, C, H, W] in [0, 1], or uint8. labels: int64 [N] in 0..num_classes-1.

    Returns:
        The classifier on the CPU, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = _moments(images)
    classifier = untrained_classifier(images.shape[1], num_classes, settings, seed, mean, std)
    classifier.to(device)
    classifier.to(memory_format=_layout(device))
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = _Batches(len(images), settings.batch_size, generator)
    total = settings.epochs * (len(images) // batches.size)
    clock = _Clock(total, settings.minutes)
    classifier.train()
    while (done := clock.done) < 1:
        _set_rate(optimizer, settings.learning_rate * one_cycle(done, settings.warmup_fraction))
        rows = batches.next()
        x = augment(_as_floats(images[rows], device), settings.augmentation, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss = F.cross_entropy(classifier(x), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clock.step += 1
        progress(clock.step, total, float(loss.detach()))
    classifier.to("cpu")
    classifier.to(memory_format=torch.contiguous_format)
    return classifier.eval().requires_grad_(False)


def untrained_classifier(
    channels: int, num_classes: int, settings: ClassifierTraining, seed: int = 0, mean: float = 0.5, std: float = 0.25
) -> ConvClassifier | ResidualClassifier:
    """The network that `train_classifier` trains, with the weights that it begins with.

    Args:
        channels: of the images. mean, std: their normalization.
    """

    def make() -> ConvClassifier | ResidualClassifier:
        if settings.blocks is None:
            return ConvClassifier(num_classes, settings.width, channels, mean, std)
        return ResidualClassifier(num_classes, settings.blocks, settings.width, channels, mean, std)

    made: ConvClassifier | ResidualClassifier = _seeded(seed, make)
    return made


def untrained_denoiser(
    shape: Sequence[int], num_classes: int, settings: DenoiserTraining, seed: int = 0
) -> PixelDenoiser:
    """The denoiser that `train_denoiser` trains, with the weights that it begins with.

    Args:
        shape: (channels, height, width) of the images.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=settings.train_steps, beta_schedule=settings.schedule)
    return PixelDenoiser(_seeded(seed, lambda: _unet(shape, num_classes, settings)), scheduler)


def train_denoiser(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: DenoiserTraining,
    seed: int,
    progress: Progress,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    preview: Preview = lambda step, denoiser: None,
) -> PixelDenoiser:
    """Train a class-conditional pixel denoiser; its last class embedding is the null label.

    Args:
        images: [N, C, H, W] in [0, 1], or uint8; square. labels: int64 [N] in 0..num_classes-1.
        checkpoint: a file that is written as training goes; where it is there, training goes on from
            it, as if it had never stopped. It is left in place at the end.

    Returns:
        The denoiser on the CPU, with the averaged weights.

    Raises:
        DataError: the checkpoint is damaged, or was begun with other settings or images.
    """
    training = _DenoiserTraining(images, labels, num_classes, settings, seed, torch.device(device))
    begun_with = training.begun_with()
    if checkpoint is not None and checkpoint.is_file():
        training.restore(_read(checkpoint, begun_with))
    saved = training.clock.seconds
    while training.clock.done < 1:
        loss = training.step()
        progress(training.clock.step, settings.iterations, loss)
        if checkpoint is not None and training.clock.seconds - saved >= 60 * settings.checkpoint_minutes:
            saved = training.clock.seconds
            _write(checkpoint, training.state(begun_with))
            preview(training.clock.step, training.denoiser())
    if checkpoint is not None:
        _write(checkpoint, training.state(begun_with))
    denoiser = training.denoiser()
    preview(training.clock.step, denoiser)
    return denoiser


class _DenoiserTraining:
    """A denoiser at training, and what has to be kept to go on with it."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        settings: DenoiserTraining,
        seed: int,
        device: torch.device,
    ) -> None:
        self.images, self.labels, self.num_classes = images, labels, num_classes
        self.settings, self.seed, self.device = settings, seed, device
        self.generator = torch.Generator().manual_seed(seed)
        untrained = untrained_denoiser(images.shape[1:], num_classes, settings, seed)
        self.scheduler = untrained.scheduler
        unet = untrained.unet.requires_grad_(True).to(device)
        self.unet: Any = unet.to(memory_format=_layout(device)).train()
        self.average: Any = deepcopy(self.unet).requires_grad_(False).eval()
        self.weights: list[Tensor] = list(self.unet.parameters())
        self.averaged: list[Tensor] = list(self.average.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.learning_rate, fused=True)
        self.abar: Tensor = self.scheduler.alphas_cumprod
        self.batches = _Batches(len(images), settings.batch_size, self.generator)
        self.clock = _Clock(settings.iterations, settings.minutes)

    def step(self) -> float:
        """One step of the optimizer on one batch; returns its loss."""
        settings, generator = self.settings, self.generator
        _set_rate(self.optimizer, settings.learning_rate * one_cycle(self.clock.done, settings.warmup_fraction))
        rows = self.batches.next()
        x0 = augment(_as_floats(self.images[rows], self.device), settings.augmentation, generator) * 2 - 1
        dropped = torch.rand(len(rows), generator=generator) < settings.label_drop
        label = self.labels[rows].masked_fill(dropped, self.num_classes).to(self.device)
        timestep = torch.randint(0, settings.train_steps, (len(rows),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        a = self.abar[timestep].view(-1, 1, 1, 1).to(self.device)
        x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=_layout(self.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            predicted = predict_padded(self.unet, x, timestep.to(self.device), label)
        loss = F.mse_loss(predicted.float(), noise)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, settings.gradient_clip)
        self.optimizer.step()
        self.clock.step += 1
        # A short training would otherwise end with weights that still remember the first ones.
        decay = min(settings.ema, self.clock.step / (self.clock.step + 10))
        torch._foreach_lerp_(self.averaged, [w.detach() for w in self.weights], 1 - decay)
        return float(loss.detach())

    def denoiser(self) -> PixelDenoiser:
        """The denoiser so far, on the CPU, with the averaged weights."""
        average = deepcopy(self.average).to("cpu").to(memory_format=torch.contiguous_format)
        return PixelDenoiser(average, self.scheduler)

    def begun_with(self) -> dict[str, Any]:
        """What a checkpoint has to agree with; the time budget may change."""
        settings = self.settings.model_dump(mode="json", exclude={"minutes", "checkpoint_minutes", "kind"})
        return {"settings": settings, "seed": self.seed, "images": list(self.images.shape), "classes": self.num_classes}

    def state(self, begun_with: dict[str, Any]) -> dict[str, Any]:
        return {
            "begun_with": begun_with,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.batches.order,
            "position": self.batches.position,
            "step": self.clock.step,
            "seconds": self.clock.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.batches.order, self.batches.position = state["order"], state["position"]
        self.clock = _Clock(self.settings.iterations, self.settings.minutes, state["step"], state["seconds"])


class _Batches:
    """Endless full batches of row numbers, each epoch in a new order."""

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.count, self.size, self.generator = count, min(size, count), generator
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next(self) -> Tensor:
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.randperm(self.count, generator=self.generator), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]


class _Clock:
    """How much of a training is done: of its steps, or of its time if that is gone sooner."""

    def __init__(self, steps: int, minutes: float | None, step: int = 0, seconds: float = 0.0) -> None:
        self.steps, self.minutes, self.step = steps, minutes, step
        self.started = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def done(self) -> float:
        """In [0, 1]; 1 at the end."""
        spent = 0.0 if self.minutes is None else self.seconds / (60 * self.minutes)
        return min(1.0, max(self.step / self.steps, spent))


def one_cycle(done: float, warmup: float) -> float:
    """The learning rate's factor in [0, 1]: up from 1/25 by a half cosine, then down to nothing (arXiv 1708.07120).

    Args:
        done: share of the training that is done. warmup: share in which it rises.

    Example:
        >>> [round(one_cycle(done, 0.5), 2) for done in (0.0, 0.5, 0.75, 1.0)]
        [0.04, 1.0, 0.5, 0.0]
    """
    if done < warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / warmup)) / 2
    return (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def _layout(device: torch.device | str) -> torch.memory_format:
    """Channels-last where it is faster; on processors training is slower in it, and torch 2.13's corrupts memory
    with four channels and one thread."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _unet(shape: Sequence[int], num_classes: int, settings: DenoiserTraining) -> Any:
    from diffusers import UNet2DModel

    channels, _, side = shape
    levels = range(len(settings.channels))
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=settings.channels,
        down_block_types=tuple("AttnDownBlock2D" if each in settings.attention else "DownBlock2D" for each in levels),
        up_block_types=tuple("AttnUpBlock2D" if each in settings.attention else "UpBlock2D" for each in levels[::-1]),
        layers_per_block=settings.layers_per_block,
        dropout=settings.dropout,
        norm_num_groups=settings.norm_groups,
        num_class_embeds=num_classes + 1,
    )


def _moments(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation in [0, 1], of at most some thousand images."""
    some = _as_floats(images[:: -(-len(images) // 5000)], "cpu")
    return float(some.mean()), float(some.std())


def _as_floats(images: Tensor, device: torch.device | str) -> Tensor:
    moved = images.to(device)
    return moved if moved.is_floating_point() else moved.float() / 255


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    """Make a network with weights of its own seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state, beside)
    os.replace(beside, path)


def _read(path: Path, begun_with: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["begun_with"]
    except Exception as error:  # whatever torch.load raises for a damaged file
        raise DataError(f"{path}: not a checkpoint of a training ({type(error).__name__}); remove it") from None
    for key, value in begun_with.items():
        if found.get(key) != value:
            raise DataError(f"{path}: this training was begun with other {key}; remove the file to begin anew")
    return state
