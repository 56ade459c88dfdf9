"""Deterministic DDIM: the timesteps and noise levels that sampling visits, and the arithmetic of a move.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1) with eta = 0: ``abar`` is the
cumulative alpha of a level, ``eps`` the predicted noise, ``x0`` the estimate of the clean latents.
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


# Coefficients are computed in float64, one for each sample, and meet the latents in their type, which is
# what guided-diffusion's float64 tables come to. It rounds abar before the roots of `ddim_move` only.


def predict_x0(x: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The clean latents that x and eps imply (DDIM, equation 9). abar: float64, [B] or scalar, in (0, 1]."""
    return _each((1 / abar).sqrt(), x) * x - _each((1 / abar - 1).sqrt(), x) * eps


def predict_eps(x: Tensor, x0: Tensor, abar: Tensor) -> Tensor:
    """The noise that x and x0 imply, the inverse of `predict_x0`. abar: in (0, 1)."""
    return (_each((1 / abar).sqrt(), x) * x - x0) / _each((1 / abar - 1).sqrt(), x)


def ddim_move(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The latents at the level of abar along eps (DDIM, equation 12, eta = 0)."""
    rounded = abar.float()
    return _each(rounded.sqrt(), x0) * x0 + _each((1 - rounded).sqrt(), x0) * eps


def ddim_step(
    x: Tensor,
    eps: Tensor,
    moves: Moves,
    k: Tensor,
    *,
    clip: Tensor,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    earlier: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One move, up or down, of samples that are each at a place of their own.

    Args:
        x, eps: latents [B, ...] and their predicted noise.
        k: int64 [B], the index of each sample's move.
        clip: bool [B]: clamp the estimate of the clean latents to [-1, 1], and make eps agree.
        guide: (x, unclamped x0, abar [B]) -> scale times the gradient of classifier guidance; eps
            becomes eps - sqrt(1 - abar) * that, and x0 follows without another clamp.
        earlier: x0 of each sample's move before, where ``known`` (bool [B]) says that it made one:
            the second-order multistep rule of DPM-Solver++ (2M, arXiv 2211.01095, algorithm 2), which
            is this move along x0 extrapolated from both. None: first order, DDIM.

    Returns:
        The latents that the moves reach, and x0.
    """
    abar = moves.leaves[k]
    x0 = raw = predict_x0(x, eps, abar)
    if clip.any():
        within = _each(clip, x, boolean=True)
        x0 = torch.where(within, raw.clamp(-1, 1), raw)
        eps = torch.where(within, predict_eps(x, x0, abar), eps)
    if guide is not None:
        eps = eps - _each((1 - abar).sqrt(), x) * guide(x, raw, abar)
        x0 = predict_x0(x, eps, abar)
    estimate = x0
    if earlier is not None and known is not None:
        weight = torch.where(known, moves.extrapolation[k], 0.0)
        x0 = x0 + _each(weight, x) * (x0 - earlier)
        eps = torch.where(_each(weight > 0, x, boolean=True), predict_eps(x, x0, abar), eps)
    return ddim_move(x0, eps, moves.reaches[k]), estimate


def _each(values: Tensor, x: Tensor, *, boolean: bool = False) -> Tensor:
    """One number a sample, as what multiplies x [B, ...]."""
    return values.to(torch.bool if boolean else x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
