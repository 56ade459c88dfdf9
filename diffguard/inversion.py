"""Deterministic DDIM inversion of images into noise, with adaptive early-stop per sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.ddim import Grid, ddim_move, predict_eps, predict_x0
from diffguard.denoisers import Denoiser
from diffguard.errors import SettingError
from diffguard.guidance import guided_eps
from diffguard.settings import AdaptiveStop

Similarity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], the input's latents, likewise) -> similarities [B], higher = more alike."""


@dataclass(frozen=True)
class Inverted:
    """Where the samples of a batch stopped.

    Attributes:
        latents: [B, ...], each sample at its own level.
        level: int64 [B]: how many moves it made.
    """

    latents: Tensor
    level: Tensor


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    latents: Tensor,
    grid: Grid,
    stops: Sequence[int | AdaptiveStop],
    *,
    clip: bool,
    label: Tensor | None = None,
    scale: float = 1.0,
    similarities: dict[str, Similarity] | None = None,
) -> list[Inverted]:
    """Walk up the noise levels once, and stop each sample by each of several rules.

    A sample leaves the batch when its last rule has stopped it. With ``clip``, the estimate of the
    clean latents is clamped to [-1, 1] and eps made to agree, except at the first step (as published).

    Args:
        latents: [B, ...], at level 0.
        stops: the level to stop at, or an adaptive rule whose thresholds are set.
        label: int64 [B]; None: without a label. scale: of its classifier-free guidance.
        similarities: what adaptive rules name beside psnr, whose default is `psnr` on the latents.

    Returns:
        One `Inverted` for each rule.

    Raises:
        SettingError: a rule's threshold is not set, or a level is above the grid's.
    """
    found = {"psnr": psnr, **(similarities or {})}
    for stop in stops:
        if isinstance(stop, AdaptiveStop) and None in stop.thresholds.values():
            raise SettingError("stop.thresholds: not set yet; call fit() with calibration images first")
        if _last(stop) > grid.levels:
            raise SettingError(f"stop: level {_last(stop)} is above the grid's {grid.levels}")
    batch = len(latents)
    ends = [Inverted(latents.clone(), latents.new_zeros(batch, dtype=torch.long)) for _ in stops]
    open_rules = latents.new_ones((len(stops), batch), dtype=torch.bool)
    x = latents
    rows = torch.arange(batch, device=latents.device)
    if label is None:
        label, scale = torch.full((batch,), denoiser.null_label or 0, device=latents.device), 1.0
    for move in range(max(_last(stop) for stop in stops)):
        x = _step_up(denoiser, x, label[rows], scale, grid, move, clip=clip and move > 0)
        for rule, (stop, end) in enumerate(zip(stops, ends, strict=True)):
            stopping = open_rules[rule, rows] & _stops_here(stop, move + 1, x, latents[rows], found)
            end.latents[rows[stopping]] = x[stopping]
            end.level[rows[stopping]] = move + 1
            open_rules[rule, rows[stopping]] = False
        live = open_rules[:, rows].any(dim=0)
        x, rows = x[live], rows[live]
        if not len(rows):
            break
    return ends


def _step_up(
    denoiser: Denoiser, x: Tensor, label: Tensor, scale: float, grid: Grid, move: int, *, clip: bool
) -> Tensor:
    timestep = grid.up.timestep[move].to(x.device).expand(len(x))
    eps = guided_eps(denoiser, x, timestep, label, scale, None)
    # The published first step takes abar in float32, where 1 - abar is 1e-4 and rounds by 1e-4 of it.
    abar = grid.up.leaves[move].float().double() if move == 0 else grid.up.leaves[move]
    x0 = predict_x0(x, eps, abar)
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = predict_eps(x, x0, abar)
    return ddim_move(x0, eps, grid.up.reaches[move])


def _last(stop: int | AdaptiveStop) -> int:
    return stop.max_level if isinstance(stop, AdaptiveStop) else stop


def _stops_here(
    stop: int | AdaptiveStop, level: int, x: Tensor, reference: Tensor, similarities: dict[str, Similarity]
) -> Tensor:
    if level == _last(stop):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    stopping = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if isinstance(stop, AdaptiveStop) and level >= stop.min_level:
        for name, threshold in stop.thresholds.items():
            assert threshold is not None
            stopping |= similarities[name](x, reference) < threshold
    return stopping


def psnr(latents: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB as published: values in [-1, 1], peak 255. Shape [B]."""
    mse = (latents - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / mse)
