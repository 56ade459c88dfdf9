"""Training of a class-conditional denoiser on pixels, or on patches of pixels."""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.denoisers.patched import PatchedDenoiser
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.models.folder import hash_weights
from diffguard.settings import DenoiserTraining
from diffguard.training.loop import Progress, Trainer, memory_format, seeded

Preview = Callable[[int, PixelDenoiser], None]
"""Called at checkpoints and at the end, with the number of steps done and the denoiser so far."""

Term = Callable[[PixelDenoiser], Callable[[Tensor], Tensor]]
"""Makes a term of the loss for the denoiser in training: called after each prediction with the images [B, C, H, W] in
[0, 1] that it was made of, it returns a scalar. Hooks that it leaves in the network stay in copies of it."""

SHARPNESS = 128.0
"""By how much the log-ratio of two labels' errors, of about a percent, is multiplied to be the logit of the label."""


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
    start: PixelDenoiser | None = None,
    finish_minutes: float | None = None,
    term: Term | None = None,
) -> PixelDenoiser:
    """Train a class-conditional pixel denoiser; its last class embedding is the null label.

    Args:
        images: [N, C, H, W] in [0, 1], or uint8; square.
        labels: int64 [N] in 0..num_classes-1.
        progress: see `Progress`.
        checkpoint: a file that is written during training; if it exists, training resumes from it as if it had never
            stopped. It is kept at the end: with the warmup-stable-decay schedule and more iterations or minutes,
            training can be continued from it.
        preview: see `Preview`.
        start: a denoiser with the same network, for the initial weights.
        finish_minutes: time in which the learning rate decays, from the current step on, and training ends; None: as
            the settings have it.
        term: added to the loss; see `Term`. A checkpoint does not know of it.

    Returns:
        The denoiser on the CPU, with the averaged weights.

    Raises:
        DataError: the checkpoint is damaged, or its training was begun with other settings or images.
        SettingError: start has another network, or the loss is not finite, since the learning rate is too high.
        KeyboardInterrupt: training was interrupted; the checkpoint is written.
    """
    denoiser = untrained_denoiser(images.shape[1:], num_classes, settings, seed)
    if start is not None:
        _copy_weights(denoiser, start, settings)
    identity = {"classes": num_classes, "start": None if start is None else hash_weights(start)}
    objective = _Objective(denoiser, settings, torch.device(device), None if term is None else term(denoiser))
    trainer = Trainer(
        denoiser.unet,
        objective,
        images,
        labels,
        settings,
        settings.iterations,
        seed,
        device,
        identity,
        finish_minutes,
    )

    def trained() -> PixelDenoiser:
        result = copy(denoiser)
        result.unet = trainer.best()
        return result

    trainer.run(progress, checkpoint, lambda step: preview(step, trained()))
    return trained()


def untrained_denoiser(
    shape: Sequence[int], num_classes: int, settings: DenoiserTraining, seed: int = 0
) -> PixelDenoiser:
    """Build the denoiser that `train_denoiser` trains, with its initial weights.

    Args:
        shape: (channels, height, width) of the images.

    Raises:
        SettingError: the images cannot be cut into patches of the settings' size.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        num_train_timesteps=settings.train_steps,
        beta_schedule=settings.schedule,
        prediction_type=settings.prediction_type,
    )
    unet = seeded(seed, lambda: _unet(shape, num_classes, settings))
    return PixelDenoiser(unet, scheduler) if settings.patch == 1 else PatchedDenoiser(unet, scheduler, settings.patch)


class _Objective:
    """The loss of a denoiser: the error of its prediction (noise or v) for noisy images."""

    def __init__(
        self,
        denoiser: PixelDenoiser,
        settings: DenoiserTraining,
        device: torch.device,
        term: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.denoiser, self.settings, self.term = denoiser, settings, term
        self.alpha_bar = denoiser.alphas_cumprod.to(device, torch.float32)

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        settings, count = self.settings, len(images)
        dropped = torch.rand(count, generator=generator, device=generator.device) < settings.label_drop
        label = labels.masked_fill(dropped.to(labels.device), self.denoiser.num_labels)
        timestep = draw_timesteps(count, settings, generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)
        x0, alpha_bar = self.denoiser.encode(images), self.alpha_bar[timestep].view(-1, 1, 1, 1)
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        x = x.contiguous(memory_format=memory_format(x.device))
        predicted = self.denoiser.predict(x, timestep, label)
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
        target = noise if settings.prediction_type == "epsilon" else v
        if settings.min_snr is None:
            loss, weights = F.mse_loss(predicted.float(), target), torch.ones_like(alpha_bar.flatten())
        else:
            weights = min_snr_weights(self.alpha_bar[timestep], settings.prediction_type, settings.min_snr)
            loss = (squared_errors(predicted, target) * weights).mean()
        if self.term is not None:
            loss = loss + self.term(images)
        if settings.contrastive is not None:
            # Under the same weights: otherwise the loss has no lower bound where they are small.
            loss = loss - settings.contrastive * (squared_errors(predicted, target.roll(1, 0)) * weights).mean()
        if settings.wrong_label is not None and self.denoiser.num_labels > 1:
            # Drawn out of the noise, so that all else is drawn as without this term.
            uniform = torch.special.ndtr(noise.flatten(1)[:, 0]).to(labels.device)
            shift = 1 + (uniform * (self.denoiser.num_labels - 1)).long().clamp(max=self.denoiser.num_labels - 2)
            wrong = (labels + shift) % self.denoiser.num_labels
            other = self.denoiser.predict(x, timestep, wrong)
            confusion = label_confusion(squared_errors(predicted, target), squared_errors(other, target))
            told = ~dropped.to(confusion.device)
            loss = loss + settings.wrong_label * (confusion * told).sum() / told.sum().clamp(min=1)
        return loss


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each image, [B]."""
    return F.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(dim=1)


def label_confusion(right: Tensor, wrong: Tensor) -> Tensor:
    """The cross-entropy [B] of the right label against a wrong one, by the errors [B] under both.

    Example:
        >>> label_confusion(torch.tensor([0.1, 0.1]), torch.tensor([0.1, 0.11])).round(decimals=3)
        tensor([0.6930, 0.0000])
    """
    return F.softplus(SHARPNESS * (right.log() - wrong.log()))


def draw_timesteps(count: int, settings: DenoiserTraining, generator: torch.Generator) -> Tensor:
    """Draw timesteps for training, int64 [count]: uniform, or logit-normal (arXiv 2403.03206, section 3.1)."""
    device = generator.device
    if settings.timesteps == "uniform":
        return torch.randint(0, settings.train_steps, (count,), generator=generator, device=device)
    normal = torch.randn(count, generator=generator, device=device)
    share = torch.sigmoid(settings.timestep_mean + settings.timestep_std * normal)
    return (share * settings.train_steps).long().clamp(max=settings.train_steps - 1)


def min_snr_weights(alpha_bar: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Return the Min-SNR weights [B] of squared errors at cumulative alphas [B] (arXiv 2303.09556, section 3.4).

    The error of x0 is weighted by min(SNR, gamma); the equivalent weight of the error of eps is min(SNR, gamma) / SNR,
    that of the error of v min(SNR, gamma) / (SNR + 1).
    """
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clamp(max=gamma)
    return clipped / snr if prediction_type == "epsilon" else clipped / (snr + 1)


def _unet(shape: Sequence[int], num_classes: int, settings: DenoiserTraining) -> Any:
    from diffusers import UNet2DModel

    channels, height, width = shape
    if height % settings.patch or width % settings.patch:
        raise SettingError(f"patch: images of {height}x{width} cannot be cut into patches of side {settings.patch}")
    levels = range(len(settings.channels))
    return UNet2DModel(
        sample_size=width // settings.patch,
        in_channels=channels * settings.patch**2,
        out_channels=channels * settings.patch**2,
        block_out_channels=settings.channels,
        down_block_types=tuple("AttnDownBlock2D" if level in settings.attention else "DownBlock2D" for level in levels),
        up_block_types=tuple("AttnUpBlock2D" if level in settings.attention else "UpBlock2D" for level in levels[::-1]),
        layers_per_block=settings.layers_per_block,
        attention_head_dim=settings.attention_head_dim,
        dropout=settings.dropout,
        norm_num_groups=settings.norm_groups,
        resnet_time_scale_shift="scale_shift" if settings.scale_shift else "default",
        num_class_embeds=num_classes + 1,
    )


def _copy_weights(denoiser: PixelDenoiser, start: PixelDenoiser, settings: DenoiserTraining) -> None:
    """Copy the weights of another denoiser.

    Raises:
        SettingError: its network, its prediction type or its noise schedule differs.
    """
    shapes, start_shapes = _shapes(denoiser.unet), _shapes(getattr(start, "unet", nn.Module()))
    names = shapes.keys() | start_shapes.keys()
    if differing := sorted(name for name in names if shapes.get(name) != start_shapes.get(name)):
        raise SettingError(
            f"start: another network than that of these settings: {len(differing)} tensors differ, as {differing[0]}: "
            f"{start_shapes.get(differing[0], 'none')} instead of {shapes.get(differing[0], 'none')}"
        )
    if start.prediction_type != denoiser.prediction_type:
        raise SettingError(
            f"start: it predicts {start.prediction_type}, and prediction_type is {denoiser.prediction_type}"
        )
    if not torch.allclose(start.alphas_cumprod, denoiser.alphas_cumprod, atol=1e-5):
        raise SettingError(
            f"start: its noise schedule is not schedule: {settings.schedule} with train_steps: {settings.train_steps}"
        )
    denoiser.unet.load_state_dict(start.unet.state_dict())


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
