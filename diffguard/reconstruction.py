"""Regenerating images from their noise: DDIM denoising from a level of its own for each sample."""

import torch
from torch import Tensor

from diffguard.ddim import Grid, ddim_move, predict_eps, predict_x0
from diffguard.denoisers import Denoiser
from diffguard.guidance import CleanGradient, guided_eps


@torch.no_grad()
def reconstruct(
    denoiser: Denoiser,
    latents: Tensor,
    level: Tensor,
    grid: Grid,
    label: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    gradient: CleanGradient | None = None,
    clip: bool,
) -> Tensor:
    """Denoise each sample from its level down to 0 (DDIM, eta = 0).

    Args:
        latents: [B, ...], each at its level. level: int64 [B].
        label: int64 [B]; the denoiser's null label makes the unconditional reconstruction.
        scale, mask: classifier-free guidance, see `guided_eps`.
        gradient: classifier guidance: eps becomes eps - sqrt(1 - abar) * scale * gradient.
        clip: clamp the estimate of the clean latents to [-1, 1], before the gradient acts.

    Returns:
        Latents at level 0, [B, ...].
    """
    x = latents.clone()
    for k in range(int(level.max()), 0, -1):
        rows = torch.nonzero(level >= k)[:, 0]
        abar, here = grid.abar_like(k, x), x[rows]
        timestep = grid.timesteps[k].to(x.device).expand(len(rows))
        eps = guided_eps(denoiser, here, timestep, label[rows], scale, None if mask is None else mask[rows])
        x0 = raw = predict_x0(here, eps, abar)
        if clip:
            x0 = raw.clamp(-1, 1)
            eps = predict_eps(here, x0, abar)
        if gradient is not None:
            push = torch.zeros_like(eps)
            for start in sorted(set(level[rows].tolist())):
                same = level[rows] == start
                push[same] = gradient(here[same], raw[same], abar, start - k, rows[same])
            eps = eps - (1 - abar).sqrt() * gradient.scale * push
            x0 = predict_x0(here, eps, abar)
        x[rows] = ddim_move(x0, eps, grid.abar_like(k - 1, x))
    return x
