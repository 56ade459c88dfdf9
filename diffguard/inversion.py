"""Deterministic DDIM inversion of images into noise, with adaptive early-stop per sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.ddim import Grid, ddim_step
from diffguard.denoisers import Denoiser
from diffguard.errors import SettingError
from diffguard.guidance import guided_eps
from diffguard.path import path_gaps, path_terms
from diffguard.settings import AdaptiveStop

Similarity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], the input's latents, likewise) -> similarities [B], higher = more alike."""


@dataclass(frozen=True)
class Inverted:
    """Where the samples of a batch stopped.

    Attributes:
        latents: [B, ...], each sample at its own level.
        level: int64 [B], on the CPU: how many moves it made.
        path: float64 [B, 6], on the CPU: the statistics of its way there; see `diffguard.path`.
    """

    latents: Tensor
    level: Tensor
    path: Tensor


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
    solver: str = "ddim",
    similarities: dict[str, Similarity] | None = None,
) -> list[Inverted]:
    """Walk up the noise levels once, and stop each sample by each of several rules.

    A sample leaves the batch when its last rule has stopped it. With ``clip``, the estimate of the
    clean latents is clamped to [-1, 1] and eps made to agree, except at the first step (as published).

    Args:
        latents: [B, ...], at level 0.
        stops: the level to stop at, or an adaptive rule whose thresholds are set.
        label: int64 [B]; None: without a label. scale: of its classifier-free guidance.
        solver: see `Variant.solver`.
        similarities: what adaptive rules name beside psnr, whose default is `psnr` on the latents.

    Returns:
        One `Inverted` for each rule.

    Raises:
        SettingError: a rule's threshold is not set, or a level is above the grid's.
    """
    found = {"psnr": psnr, **(similarities or {})}
    for stop in stops:
        check_set(stop)
        if last_level(stop) > grid.levels:
            raise SettingError(f"stop: level {last_level(stop)} is above the grid's {grid.levels}")
    batch = len(latents)
    path = torch.zeros((batch, 6), dtype=torch.float64)
    ends = [Inverted(latents.clone(), torch.zeros(batch, dtype=torch.long), path.clone()) for _ in stops]
    open_rules = torch.ones((len(stops), batch), dtype=torch.bool)
    x, earlier, before = latents, None, latents
    rows, gaps = torch.arange(batch), path_gaps(grid.up.timestep, len(denoiser.alphas_cumprod))
    if label is None:
        label, scale = torch.full((batch,), denoiser.null_label or 0, device=latents.device), 1.0
    for move in range(max(last_level(stop) for stop in stops)):
        k = torch.full((len(rows),), move)
        eps = guided_eps(denoiser, x, grid.up.timestep[k].to(x.device), label[rows], scale, None)
        path[rows] += path_terms(eps, before, gaps[k])
        # The published first move is not clamped.
        clamped = torch.full_like(k, clip and move > 0, dtype=torch.bool)
        x, x0 = ddim_step(x, eps, grid.up, k, clip=clamped, earlier=earlier, known=k > 0)
        earlier = x0 if solver == "dpm-solver++" else None
        for rule, (stop, end) in enumerate(zip(stops, ends, strict=True)):
            stopping = open_rules[rule, rows] & stops_here(stop, k + 1, x, latents[rows], found)
            end.latents[rows[stopping]] = x[stopping]
            end.level[rows[stopping]] = move + 1
            end.path[rows[stopping]] = path[rows[stopping]]
            open_rules[rule, rows[stopping]] = False
        live = open_rules[:, rows].any(dim=0)
        x, before, rows, earlier = x[live], eps[live], rows[live], None if earlier is None else earlier[live]
        if not len(rows):
            break
    return ends


def check_set(stop: int | AdaptiveStop) -> None:
    """See that a rule's thresholds are set.

    Raises:
        SettingError: one is not.
    """
    if isinstance(stop, AdaptiveStop) and None in stop.thresholds.values():
        raise SettingError("stop.thresholds: not set yet; call fit() with calibration images first")


def last_level(stop: int | AdaptiveStop) -> int:
    """The level where a rule stops every sample."""
    return stop.max_level if isinstance(stop, AdaptiveStop) else stop


def stops_here(
    stop: int | AdaptiveStop, level: Tensor, x: Tensor, reference: Tensor, similarities: dict[str, Similarity]
) -> Tensor:
    """Whether a rule stops each sample at the level that it has reached.

    Args:
        level: int64 [B]. x, reference: its latents there, and the input's, [B, ...].

    Returns:
        bool [B], where ``level`` is.
    """
    stopping = level == last_level(stop)
    if isinstance(stop, AdaptiveStop) and (looked := (level >= stop.min_level) & ~stopping).any():
        for name, threshold in stop.thresholds.items():
            assert threshold is not None
            stopping |= looked & (similarities[name](x, reference) < threshold).to(level.device)
    return stopping


def psnr(latents: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB as published: values in [-1, 1], peak 255. Shape [B]."""
    mse = (latents - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / mse)
