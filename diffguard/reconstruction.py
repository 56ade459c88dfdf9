"""Regenerating images from their noise: DDIM denoising from a step of its own for each sample."""

import torch
from torch import Tensor

from diffguard.ddim import Grid, ddim_move, predict_eps, predict_x0
from diffguard.denoisers import Denoiser
from diffguard.guidance import CleanGradient, guided_eps


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
) -> Tensor:
    """Denoise each sample from its first move down to the last, index 0 (DDIM, eta = 0).

    Each state is evaluated once: the same prediction serves eps and the estimate of the clean latents
    at which the gradient is taken (the published code asks twice).

    Args:
        latents: [B, ...]. start: int64 [B], the index of each sample's first move; see `Grid.start`.
        label: int64 [B]; the denoiser's null label makes the unconditional reconstruction.
        scale, mask: classifier-free guidance, see `guided_eps`.
        gradient: classifier guidance: eps becomes eps - sqrt(1 - abar) * scale * gradient.
        clip: clamp the estimate of the clean latents to [-1, 1], before the gradient acts.

    Returns:
        Clean latents, [B, ...].
    """
    x = latents.clone()
    for k in range(int(start.max()), -1, -1):
        rows = torch.nonzero(start >= k)[:, 0]
        abar, here = grid.down.leaves[k], x[rows]
        timestep = grid.down.timestep[k].to(x.device).expand(len(rows))
        eps = guided_eps(denoiser, here, timestep, label[rows], scale, None if mask is None else mask[rows])
        x0 = raw = predict_x0(here, eps, abar)
        if clip:
            x0 = raw.clamp(-1, 1)
            eps = predict_eps(here, x0, abar)
        if gradient is not None:
            push = torch.zeros_like(eps)
            for first in sorted(set(start[rows].tolist())):
                same = start[rows] == first
                push[same] = gradient(here[same], raw[same], abar, first - k, rows[same])
            eps = eps - float((1 - abar).sqrt()) * gradient.scale * push
            x0 = predict_x0(here, eps, abar)
        x[rows] = ddim_move(x0, eps, grid.down.reaches[k])
    return x
