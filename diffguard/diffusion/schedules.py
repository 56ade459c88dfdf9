"""The timesteps and noise levels that sampling visits.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1): ``abar`` is the cumulative alpha of a level.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffguard.errors import SettingError


@dataclass(frozen=True)
class Moves:
    """The K moves of one direction, in the order of their index.

    Attributes:
        timestep: int64 [K]: the training timestep that the network is asked at.
        leaves: float64 [K], in (0, 1]: abar of the level that the move leaves.
        reaches: float64 [K], in [0, 1]: abar of the level that it reaches.
    """

    timestep: Tensor
    leaves: Tensor
    reaches: Tensor

    @cached_property
    def extrapolation(self) -> Tensor:
        """float64 [K]: how far a second-order move goes on from the x0 of the move before to its own.

        h / (2 h_before) of half log-SNR; 0 where a move begins or ends at a level without noise, or
        of noise alone, or has none before it.
        """
        h = (torch.logit(self.reaches) - torch.logit(self.leaves)) / 2
        before = torch.full_like(h, torch.inf)
        if self.leaves[0] > self.reaches[0]:
            before[1:] = h[:-1]  # up
        else:
            before[:-1] = h[1:]  # down
        weight = h / (2 * before)
        return torch.where(h.isfinite() & before.isfinite(), weight, 0.0)


@dataclass(frozen=True)
class Grid:
    """One sampling schedule: inversion moves ``up`` from index 0, denoising ``down`` to index 0."""

    up: Moves
    down: Moves

    @property
    def levels(self) -> int:
        """K: how many moves lead from the image to the noisiest level."""
        return len(self.up.timestep)

    def start(self, level: Tensor, forback_skip_diff: int, skip_first_steps: int) -> Tensor:
        """The index of the first denoising move for samples at these levels; see `Variant`."""
        if forback_skip_diff == 0:
            return torch.full_like(level, self.levels - 1 - skip_first_steps)
        return (level + forback_skip_diff - 2).clamp(0, self.levels - 1)


def trailing_grid(alphas_cumprod: Tensor, levels: int) -> Grid:
    """K even strides that end at the last training step: level k is timestep k * T/K - 1.

    Level 0 is the clean image (abar 1). No timestep belongs to it, so the first inversion move asks
    the network half a stride up, between it and level 1.

    Args:
        alphas_cumprod: the denoiser's cumulative alphas, shape [T].
        levels: K, a divisor of T.

    Raises:
        SettingError: K does not divide T, or is out of range.

    Example:
        >>> grid = trailing_grid(torch.linspace(0.999, 0.001, 1000), levels=10)
        >>> grid.up.timestep.tolist()
        [49, 99, 199, 299, 399, 499, 599, 699, 799, 899]
        >>> grid.down.timestep.tolist()
        [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    """
    steps = len(alphas_cumprod)
    if levels < 1 or steps % levels or steps // levels < 2:
        raise SettingError(f"levels: {levels} does not divide the denoiser's {steps} training steps into strides")
    stride = steps // levels
    down = torch.arange(1, levels + 1) * stride - 1
    up = torch.cat([torch.tensor([stride // 2 - 1]), down[:-1]])
    abar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()[down]])
    return Grid(Moves(up, abar[:-1], abar[1:]), Moves(down, abar[1:], abar[:-1]))


def guided_diffusion_grid(alphas_cumprod: Tensor, levels: int) -> Grid:
    """The "ddimK" grid of guided-diffusion: t_k = k * s, s the smallest stride that makes K steps.

    The image is taken for the latents at index 0. Inversion asks the network at t_k and moves to
    index k + 1 (abar 0 after the last); denoising moves from index k to k - 1 (abar 1 after the last).

    Raises:
        SettingError: no stride makes K steps.

    Example:
        >>> guided_diffusion_grid(torch.linspace(0.999, 0.001, 1000), 20).down.timestep[-1]
        tensor(950)
    """
    steps = len(alphas_cumprod)
    stride = next((s for s in range(1, steps) if len(range(0, steps, s)) == levels), None)
    if stride is None:
        raise SettingError(f"levels: no stride makes {levels} of the denoiser's {steps} training steps")
    timestep = torch.arange(0, steps, stride)
    abar = alphas_cumprod.double().cpu()[timestep]
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    # The published first inversion move takes abar in float32, where 1 - abar is 1e-4 and rounds by 1e-4 of it.
    leaves = torch.cat([abar[:1].float().double(), abar[1:]])
    return Grid(
        Moves(timestep, leaves, torch.cat([abar[1:], zero])), Moves(timestep, abar, torch.cat([one, abar[:-1]]))
    )


def latent_diffusion_grid(alphas_cumprod: Tensor, levels: int) -> Grid:
    """The grid of latent diffusion's DDIM sampler: t_i = i * (T // K) + 1, abar rounded to float32.

    Both directions ask the network at the noisier of a move's two levels. Below the first is abar of
    training step 0, not 1. Where K does not divide T there are more than K steps; T itself is left out.

    Raises:
        SettingError: K is out of range.

    Example:
        >>> latent_diffusion_grid(torch.linspace(0.999, 0.001, 1000), 25).up.timestep[-1]
        tensor(961)
    """
    steps = len(alphas_cumprod)
    if not 1 <= levels <= steps:
        raise SettingError(f"levels: {levels} is not within 1..{steps}, the denoiser's training steps")
    timestep = torch.arange(0, steps, steps // levels) + 1
    timestep = timestep[timestep < steps]
    rounded = alphas_cumprod.float().double().cpu()
    abar = rounded[timestep]
    below = torch.cat([rounded[:1], abar[:-1]])
    return Grid(Moves(timestep, below, abar), Moves(timestep, abar, below))


GRIDS: dict[str, Callable[[Tensor, int], Grid]] = {
    "trailing": trailing_grid,
    "guided-diffusion": guided_diffusion_grid,
    "latent-diffusion": latent_diffusion_grid,
}
