"""The reference: inversion and reconstruction as plain loops over one batch, which read like the paper.

The parity tests hold them to the published implementation, and the engine's tests hold the engine to them. The fitting
of a stop and the previews of a training use them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.diffusion.ddim import ddim_step
from diffguard.diffusion.early_stop import Similarity, check_thresholds_set, last_level, psnr, stops_here
from diffguard.diffusion.guidance import CleanGradient, guided_eps
from diffguard.diffusion.path_statistics import PATH_STATISTICS, path_gaps, path_terms
from diffguard.diffusion.schedules import Schedule
from diffguard.errors import SettingError
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import AdaptiveStop


@dataclass(frozen=True)
class Inverted:
    """Where the samples of a batch stopped.

    Attributes:
        latents: [B, ...], each sample at its own level.
        level: int64 [B], on the CPU: how many steps it took.
        path: float64 [B, 6], on the CPU: the statistics of its path; see `diffguard.diffusion.path_statistics`.
    """

    latents: Tensor
    level: Tensor
    path: Tensor


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    stops: Sequence[int | AdaptiveStop],
    *,
    clip: bool,
    label: Tensor | None = None,
    scale: float = 1.0,
    solver: str = "ddim",
    similarities: dict[str, Similarity] | None = None,
) -> list[Inverted]:
    """Take the steps of inversion once, and stop each sample by each of several rules.

    A sample is removed from the batch when its last rule has stopped it. With ``clip``, the estimate of the
    clean latents is clamped to [-1, 1] and eps made to agree, except at the first step (as published).

    Args:
        latents: [B, ...], at level 0.
        stops: the level to stop at, or an adaptive rule whose thresholds are set.
        label: int64 [B]; None: without a label.
        scale: of its classifier-free guidance.
        solver: see `Variant.solver`.
        similarities: what adaptive rules name beside psnr, whose default is `psnr` on the latents.

    Returns:
        One `Inverted` for each rule.

    Raises:
        SettingError: a rule's threshold is not set, or a level is above the schedule's.
    """
    similarities = {"psnr": psnr, **(similarities or {})}
    for stop in stops:
        check_thresholds_set(stop)
        if last_level(stop) > schedule.levels:
            raise SettingError(f"stop: level {last_level(stop)} is above the schedule's {schedule.levels}")
    batch, steps = len(latents), schedule.inversion
    path = torch.zeros((batch, PATH_STATISTICS), dtype=torch.float64)
    ends = [Inverted(latents.clone(), torch.zeros(batch, dtype=torch.long), path.clone()) for _ in stops]
    running = torch.ones((len(stops), batch), dtype=torch.bool)
    x, prev_x0, prev_eps = latents, None, latents
    rows, gaps = torch.arange(batch), path_gaps(steps.timestep, len(denoiser.alphas_cumprod))
    if label is None:
        label, scale = torch.full((batch,), denoiser.null_label or 0, device=latents.device), 1.0
    for index in range(max(last_level(stop) for stop in stops)):
        k = torch.full((len(rows),), index)
        eps = guided_eps(denoiser, x, steps.timestep[k].to(x.device), label[rows], scale, None)
        path[rows] += path_terms(eps, prev_eps, gaps[k])
        # The published first step is not clamped.
        x, x0 = ddim_step(x, eps, steps, k, clip=clip and index > 0, prev_x0=prev_x0, has_prev=k > 0)
        prev_x0 = x0 if solver == "dpm-solver++" else None
        for rule, (stop, end) in enumerate(zip(stops, ends, strict=True)):
            stopping = running[rule, rows] & stops_here(stop, k + 1, x, latents[rows], similarities)
            end.latents[rows[stopping]] = x[stopping]
            end.level[rows[stopping]] = index + 1
            end.path[rows[stopping]] = path[rows[stopping]]
            running[rule, rows[stopping]] = False
        kept = running[:, rows].any(dim=0)
        x, prev_eps, rows, prev_x0 = x[kept], eps[kept], rows[kept], None if prev_x0 is None else prev_x0[kept]
        if not len(rows):
            break
    return ends


@torch.no_grad()
def reconstruct(
    denoiser: Denoiser,
    latents: Tensor,
    start: Tensor,
    schedule: Schedule,
    label: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    gradient: CleanGradient | None = None,
    clip: bool,
    solver: str = "ddim",
) -> Tensor:
    """Denoise each sample from its first step down to the last, index 0 (DDIM, eta = 0).

    Each state is evaluated once: the same prediction serves eps and the estimate of the clean latents
    at which the gradient is taken (the published code evaluates the network twice).

    Args:
        latents: [B, ...].
        start: int64 [B], the index of each sample's first step; see `Schedule.start`.
        label: int64 [B]; the denoiser's null label makes the unconditional reconstruction.
        scale, mask: classifier-free guidance, see `guided_eps`.
        gradient: classifier guidance toward the label, which the denoiser is then not told.
        clip: clamp the estimate of the clean latents to [-1, 1], before the gradient acts.
        solver: see `Variant.solver`.

    Returns:
        Clean latents, [B, ...].
    """
    steps, start = schedule.denoising, start.cpu()
    x, prev_x0 = latents.clone(), torch.zeros_like(latents)
    condition = label if gradient is None else torch.full_like(label, denoiser.null_label or 0)
    for index in range(int(start.max()), -1, -1):
        rows = torch.nonzero(start >= index)[:, 0]
        k = torch.full((len(rows),), index)
        timestep = steps.timestep[k].to(x.device)
        eps = guided_eps(denoiser, x[rows], timestep, condition[rows], scale, None if mask is None else mask[rows])
        guide = None if gradient is None else gradient.at(start[rows] - k, label[rows])
        x[rows], prev_x0[rows] = ddim_step(
            x[rows],
            eps,
            steps,
            k,
            clip=clip,
            guide=guide,
            prev_x0=prev_x0[rows] if solver == "dpm-solver++" else None,
            has_prev=start[rows] > k,
        )
    return x
