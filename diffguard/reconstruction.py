"""Regenerating images from their noise: DDIM denoising from a step of its own for each sample."""

import torch
from torch import Tensor

from diffguard.ddim import Grid, ddim_step
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
