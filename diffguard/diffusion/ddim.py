"""Deterministic DDIM: the arithmetic of one step.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1) with eta = 0: ``alpha_bar`` is the
cumulative alpha of a noise level, ``eps`` the predicted noise, ``x0`` the estimate of the clean latents.

Coefficients are computed in float64, one for each sample, and meet the latents in their type, which is
what guided-diffusion's float64 tables come to. It rounds alpha_bar before the roots of `ddim_update` only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffguard.diffusion.schedules import Steps


def predict_x0(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that x and eps imply (DDIM, equation 9). alpha_bar: float64, [B] or scalar, in (0, 1]."""
    return _per_sample((1 / alpha_bar).sqrt(), x) * x - _per_sample((1 / alpha_bar - 1).sqrt(), x) * eps


def predict_eps(x: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that x and x0 imply, the inverse of `predict_x0`. alpha_bar: in (0, 1)."""
    return (_per_sample((1 / alpha_bar).sqrt(), x) * x - x0) / _per_sample((1 / alpha_bar - 1).sqrt(), x)


def ddim_update(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The latents at the level of alpha_bar along eps (DDIM, equation 12, eta = 0)."""
    rounded = alpha_bar.float()
    return _per_sample(rounded.sqrt(), x0) * x0 + _per_sample((1 - rounded).sqrt(), x0) * eps


def ddim_step(
    x: Tensor,
    eps: Tensor,
    steps: Steps,
    k: Tensor,
    *,
    clip: Tensor,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    prev_x0: Tensor | None = None,
    has_prev: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step, of inversion or denoising, of samples that are each at an index of their own.

    Args:
        x, eps: latents [B, ...] and their predicted noise.
        steps: of the schedule's direction.
        k: int64 [B], the index of each sample's step.
        clip: bool [B]: clamp the estimate of the clean latents to [-1, 1], and make eps agree.
        guide: (x, unclamped x0, alpha_bar [B]) -> scale times the gradient of classifier guidance; eps
            becomes eps - sqrt(1 - alpha_bar) * that, and x0 follows without another clamp.
        prev_x0: x0 of each sample's previous step, where ``has_prev`` (bool [B]) says that there was one:
            the second-order multistep rule of DPM-Solver++ (2M, arXiv 2211.01095, algorithm 2), which
            is this step along x0 extrapolated from both. None: first order, DDIM.

    Returns:
        The latents at the next level, and x0.
    """
    alpha_bar = steps.alpha_bar_from[k]
    x0 = unclamped = predict_x0(x, eps, alpha_bar)
    if clip.any():
        is_clipped = _per_sample(clip, x, boolean=True)
        x0 = torch.where(is_clipped, unclamped.clamp(-1, 1), unclamped)
        eps = torch.where(is_clipped, predict_eps(x, x0, alpha_bar), eps)
    if guide is not None:
        eps = eps - _per_sample((1 - alpha_bar).sqrt(), x) * guide(x, unclamped, alpha_bar)
        x0 = predict_x0(x, eps, alpha_bar)
    estimate = x0
    if prev_x0 is not None and has_prev is not None:
        weight = torch.where(has_prev, steps.extrapolation[k], 0.0)
        x0 = x0 + _per_sample(weight, x) * (x0 - prev_x0)
        eps = torch.where(_per_sample(weight > 0, x, boolean=True), predict_eps(x, x0, alpha_bar), eps)
    return ddim_update(x0, eps, steps.alpha_bar_to[k]), estimate


def _per_sample(values: Tensor, x: Tensor, *, boolean: bool = False) -> Tensor:
    """One number a sample, as what multiplies x [B, ...]."""
    return values.to(torch.bool if boolean else x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
