"""Adaptive early-stop: whether an inversion has gone far enough, for each sample by itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffguard.errors import SettingError
from diffguard.settings import AdaptiveStop

Similarity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], the input's latents, likewise) -> similarities [B], higher = more alike."""


def check_thresholds_set(stop: int | AdaptiveStop) -> None:
    """Check that a rule's thresholds are set.

    Raises:
        SettingError: one is not.
    """
    if isinstance(stop, AdaptiveStop) and None in stop.thresholds.values():
        raise SettingError("stop.thresholds: not set yet; call fit() with calibration images first")


def last_level(stop: int | AdaptiveStop) -> int:
    """The level where a rule stops every sample."""
    return stop.max_level if isinstance(stop, AdaptiveStop) else stop


def compares_at(stop: int | AdaptiveStop, level: int) -> bool:
    """Whether a rule compares latents at a level: from its first level on, and not at its last."""
    return isinstance(stop, AdaptiveStop) and stop.min_level <= level < stop.max_level


def is_unlike(stop: AdaptiveStop, x: Tensor, reference: Tensor, similarities: dict[str, Similarity]) -> Tensor:
    """Whether any similarity is under its threshold, bool [B]; arguments as of `stops_here`."""
    unlike = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for name, threshold in stop.thresholds.items():
        assert threshold is not None
        unlike |= similarities[name](x, reference) < threshold
    return unlike


def stops_here(
    stop: int | AdaptiveStop, level: Tensor, x: Tensor, reference: Tensor, similarities: dict[str, Similarity]
) -> Tensor:
    """Whether a rule stops each sample at the level that it has reached.

    Args:
        level: int64 [B].
        x, reference: its latents there, and the input's, [B, ...].

    Returns:
        bool [B], where ``level`` is.
    """
    stopping = level == last_level(stop)
    if isinstance(stop, AdaptiveStop) and (compared := (level >= stop.min_level) & ~stopping).any():
        stopping |= compared & is_unlike(stop, x, reference, similarities).to(level.device)
    return stopping


def psnr(latents: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB as published: values in [-1, 1], peak 255. Shape [B]."""
    mse = (latents - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / mse)
