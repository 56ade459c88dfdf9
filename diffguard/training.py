"""Training of the small networks that the embedded benchmark needs, and of denoisers like them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.classifiers import ConvClassifier
from diffguard.denoisers import PixelDenoiser
from diffguard.settings import Augmentation, ClassifierTraining, DenoiserTraining

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss)."""


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, settings: ClassifierTraining, seed: int, progress: Progress
) -> ConvClassifier:
    """Train a `ConvClassifier`.

    Args:
        images: [N, C, H, W] in [0, 1]. labels: int64 [N] in 0..num_classes-1.

    Returns:
        The classifier, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = float(images.mean()), float(images.std())
    classifier: ConvClassifier = _seeded(
        seed, lambda: ConvClassifier(num_classes, settings.width, images.shape[1], mean, std)
    )
    steps = settings.epochs * (len(images) // settings.batch_size)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    classifier.train()
    batches = _batches(len(images), settings.batch_size, generator)
    for step in range(steps):
        rows = next(batches)
        x = augment(images[rows], settings.augmentation, generator)
        loss = F.cross_entropy(classifier(x), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, float(loss.detach()))
    return classifier.eval().requires_grad_(False)


def train_denoiser(
    images: Tensor, labels: Tensor, num_classes: int, settings: DenoiserTraining, seed: int, progress: Progress
) -> PixelDenoiser:
    """Train a class-conditional pixel denoiser; its last class embedding is the null label.

    Args:
        images: [N, C, H, W] in [0, 1], square. labels: int64 [N] in 0..num_classes-1.

    Returns:
        The denoiser with the averaged weights.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    generator = torch.Generator().manual_seed(seed)
    unet = _seeded(
        seed,
        lambda: UNet2DModel(
            sample_size=images.shape[-1],
            in_channels=images.shape[1],
            out_channels=images.shape[1],
            block_out_channels=settings.channels,
            down_block_types=("DownBlock2D",) * len(settings.channels),
            up_block_types=("UpBlock2D",) * len(settings.channels),
            layers_per_block=settings.layers_per_block,
            norm_num_groups=settings.norm_groups,
            num_class_embeds=num_classes + 1,
        ),
    ).to(memory_format=torch.channels_last)
    average = deepcopy(unet).requires_grad_(False)
    scheduler = DDPMScheduler(num_train_timesteps=settings.train_steps, beta_schedule=settings.schedule)
    abar = scheduler.alphas_cumprod
    weights, averaged = list(unet.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.iterations, pct_start=settings.warmup_fraction
    )
    unet.train()
    batches = _batches(len(images), settings.batch_size, generator)
    for step in range(settings.iterations):
        rows = next(batches)
        x0 = augment(images[rows], settings.augmentation, generator) * 2 - 1
        dropped = torch.rand(len(rows), generator=generator) < settings.label_drop
        label = labels[rows].masked_fill(dropped, num_classes)
        timestep = torch.randint(0, settings.train_steps, (len(rows),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        a = abar[timestep].view(-1, 1, 1, 1)
        x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(unet(x, timestep, class_labels=label).sample, noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, settings.gradient_clip)
        optimizer.step()
        cycle.step()
        torch._foreach_lerp_(averaged, [w.detach() for w in weights], 1 - settings.ema)
        progress(step + 1, settings.iterations, float(loss.detach()))
    return PixelDenoiser(average.to(memory_format=torch.contiguous_format), scheduler)


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image under a random affine map of its own; black where nothing is."""
    if settings == Augmentation():
        return images
    count, side = len(images), images.shape[-1]

    def uniform(most: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * most

    angle, scale = torch.deg2rad(uniform(settings.rotation)), 1 + uniform(settings.scale)
    dx, dy = uniform(settings.shift * 2 / side), uniform(settings.shift * 2 / side)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, dx], dim=1), torch.stack([sin, cos, dy], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _batches(count: int, size: int, generator: torch.Generator) -> Any:
    """Endless full batches of row numbers, each epoch in a new order."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    """Make a network with weights of its own seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
