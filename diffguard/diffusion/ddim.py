"""Deterministic DDIM: the arithmetic of a step.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1) with eta = 0: ``abar`` is the
cumulative alpha of a level, ``eps`` the predicted noise, ``x0`` the estimate of the clean latents.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffguard.diffusion.schedules import Moves

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
