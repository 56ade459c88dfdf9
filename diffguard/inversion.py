"""Deterministic DDIM inversion of images into noise, with adaptive early-stop per sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.ddim import Grid, ddim_move, predict_eps, predict_x0
from diffguard.denoisers import Denoiser
from diffguard.distances import psnr
from diffguard.errors import SettingError
from diffguard.settings import AdaptiveStop


@dataclass(frozen=True)
class Inverted:
    """Where the samples of a batch stopped.

    Attributes:
        latents: [B, ...], each sample at its own level.
        level: int64 [B].
    """

    latents: Tensor
    level: Tensor


@torch.no_grad()
def invert(
    denoiser: Denoiser, latents: Tensor, grid: Grid, stops: Sequence[int | AdaptiveStop], *, clip: bool
) -> list[Inverted]:
    """Walk up the noise levels once, without a label, and stop each sample by each of several rules.

    A sample leaves the batch when its last rule has stopped it. With ``clip``, the estimate of the
    clean latents is clamped to [-1, 1] and eps made to agree, except at the first step (as published).

    Args:
        latents: [B, ...], at level 0.
        stops: the level to stop at, or an adaptive rule whose threshold is set.

    Returns:
        One `Inverted` for each rule.
    """
    for stop in stops:
        if isinstance(stop, AdaptiveStop) and stop.threshold is None:
            raise SettingError("stop.threshold: not set yet; call fit() with calibration images first")
    batch = len(latents)
    ends = [Inverted(latents.clone(), latents.new_zeros(batch, dtype=torch.long)) for _ in stops]
    open_rules = latents.new_ones((len(stops), batch), dtype=torch.bool)
    x = latents
    rows = torch.arange(batch, device=latents.device)
    for level in range(max(_last(stop) for stop in stops)):
        x = _step_up(denoiser, x, grid, level, clip=clip and level > 0)
        for rule, (stop, end) in enumerate(zip(stops, ends, strict=True)):
            stopping = open_rules[rule, rows] & _stops_here(stop, level + 1, x, latents[rows])
            end.latents[rows[stopping]] = x[stopping]
            end.level[rows[stopping]] = level + 1
            open_rules[rule, rows[stopping]] = False
        live = open_rules[:, rows].any(dim=0)
        x, rows = x[live], rows[live]
        if not len(rows):
            break
    return ends


def _step_up(denoiser: Denoiser, x: Tensor, grid: Grid, level: int, *, clip: bool) -> Tensor:
    timestep = grid.timesteps[level].to(x.device).expand(len(x))
    null = torch.full((len(x),), denoiser.null_label or 0, device=x.device)
    eps = denoiser.eps(x, timestep, null)
    abar = grid.abar_like(level, x)
    x0 = predict_x0(x, eps, abar)
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = predict_eps(x, x0, abar)
    return ddim_move(x0, eps, grid.abar_like(level + 1, x))


def _last(stop: int | AdaptiveStop) -> int:
    return stop.max_level if isinstance(stop, AdaptiveStop) else stop


def _stops_here(stop: int | AdaptiveStop, level: int, x: Tensor, reference: Tensor) -> Tensor:
    if level == _last(stop):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    if isinstance(stop, int) or level < stop.min_level:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    assert stop.threshold is not None
    return psnr(x, reference) < stop.threshold


def calibrate_stop(denoiser: Denoiser, latents: Tensor, grid: Grid, stop: AdaptiveStop, *, clip: bool) -> AdaptiveStop:
    """Set an adaptive stop's threshold to the median PSNR of these latents at ``stop.median_at``."""
    assert stop.median_at is not None
    [there] = invert(denoiser, latents, grid, [stop.median_at], clip=clip)
    threshold = float(psnr(there.latents, latents).median())
    return stop.model_copy(update={"threshold": threshold, "median_at": None})
