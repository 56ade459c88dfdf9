"""The reference: inversion and reconstruction as plain loops over one batch, which read like the paper.

Nothing scores with them but the fitting of a stop. The parity tests hold them to the published implementation, and
the engine's tests hold the engine to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.diffusion.ddim import ddim_step
from diffguard.diffusion.early_stop import Similarity, check_set, last_level, psnr, stops_here
from diffguard.diffusion.guidance import CleanGradient, guided_eps
from diffguard.diffusion.path_statistics import path_gaps, path_terms
from diffguard.diffusion.schedules import Grid
from diffguard.errors import SettingError
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import AdaptiveStop


@dataclass(frozen=True)
class Inverted:
    """Where the samples of a batch stopped.

    Attributes:
        latents: [B, ...], each sample at its own level.
        level: int64 [B], on the CPU: how many moves it made.
        path: float64 [B, 6], on the CPU: the statistics of its way there; see `diffguard.diffusion.path_statistics`.
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


@torch.no_grad()
def reconstruct(
    denoiser: Denoiser,
    latents: Tensor,
    start: Tensor,
    grid: Grid,
    label: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    gradient: CleanGradient | None = None,
    clip: bool,
    solver: str = "ddim",
) -> Tensor:
    """Denoise each sample from its first move down to the last, index 0 (DDIM, eta = 0).

    Each state is evaluated once: the same prediction serves eps and the estimate of the clean latents
    at which the gradient is taken (the published code asks twice).

    Args:
        latents: [B, ...]. start: int64 [B], the index of each sample's first move; see `Grid.start`.
        label: int64 [B]; the denoiser's null label makes the unconditional reconstruction.
        scale, mask: classifier-free guidance, see `guided_eps`.
        gradient: classifier guidance toward the label, for which the denoiser is not asked.
        clip: clamp the estimate of the clean latents to [-1, 1], before the gradient acts.
        solver: see `Variant.solver`.

    Returns:
        Clean latents, [B, ...].
    """
    x, earlier, start = latents.clone(), torch.zeros_like(latents), start.cpu()
    asked = label if gradient is None else torch.full_like(label, denoiser.null_label or 0)
    for move in range(int(start.max()), -1, -1):
        rows = torch.nonzero(start >= move)[:, 0]
        here, k = x[rows], torch.full((len(rows),), move)
        timestep = grid.down.timestep[k].to(x.device)
        eps = guided_eps(denoiser, here, timestep, asked[rows], scale, None if mask is None else mask[rows])
        guide = None if gradient is None else gradient.at(start[rows] - k, label[rows])
        x[rows], earlier[rows] = ddim_step(
            here,
            eps,
            grid.down,
            k,
            clip=torch.full_like(k, clip, dtype=torch.bool),
            guide=guide,
            earlier=earlier[rows] if solver == "dpm-solver++" else None,
            known=start[rows] > k,
        )
    return x
