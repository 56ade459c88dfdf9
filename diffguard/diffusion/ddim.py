"""Deterministic DDIM: the arithmetic of one step.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1) with eta = 0: ``alpha_bar`` is the
cumulative alpha of a noise level, ``eps`` the predicted noise, ``x0`` the estimate of the clean latents.

Coefficients are computed in float64, once for each step of a schedule, and meet the latents in their type, which is
what guided-diffusion's float64 tables come to. Only alpha_bar of the level that a step reaches is rounded before its
roots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffguard.diffusion.schedules import Steps


class Coefficients(NamedTuple):
    """What the latents of each sample are multiplied by in its step, [B, 1, ...] in their type.

    Attributes:
        recip: sqrt(1 / alpha_bar) of the level that the step leaves.
        recipm1: sqrt(1 / alpha_bar - 1) of it.
        noise_from: sqrt(1 - alpha_bar) of it.
        signal_to: sqrt(alpha_bar) of the level that the step reaches.
        noise_to: sqrt(1 - alpha_bar) of it.
        extrapolation: see `Steps.extrapolation`.
    """

    recip: Tensor
    recipm1: Tensor
    noise_from: Tensor
    signal_to: Tensor
    noise_to: Tensor
    extrapolation: Tensor

    @classmethod
    def of(cls, steps: Steps, k: Tensor, x: Tensor) -> "Coefficients":
        """Those of the steps at indices k, int64 [B] on the CPU, for latents like x."""
        rows = steps.coefficients.index_select(0, k).to(x.device, x.dtype)
        return cls(*rows.view(-1, len(cls._fields), *[1] * (x.ndim - 1)).unbind(1))


def predict_x0(x: Tensor, eps: Tensor, at: Coefficients) -> Tensor:
    """The clean latents that x and eps imply (DDIM, equation 9)."""
    return at.recip * x - at.recipm1 * eps


def predict_eps(x: Tensor, x0: Tensor, at: Coefficients) -> Tensor:
    """The noise that x and x0 imply, the inverse of `predict_x0`; x has noise."""
    return (at.recip * x - x0) / at.recipm1


def ddim_update(x0: Tensor, eps: Tensor, at: Coefficients) -> Tensor:
    """The latents at the level that the step reaches, along eps (DDIM, equation 12, eta = 0)."""
    return at.signal_to * x0 + at.noise_to * eps


def ddim_step(
    x: Tensor,
    eps: Tensor,
    steps: Steps,
    k: Tensor,
    *,
    clip: Tensor | bool,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    prev_x0: Tensor | None = None,
    has_prev: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step, of inversion or denoising, of samples that are each at an index of their own.

    Args:
        x, eps: latents [B, ...] and their predicted noise.
        steps: of the schedule's direction.
        k: int64 [B], on the CPU: the index of each sample's step.
        clip: bool [B], or one for all: clamp the estimate of the clean latents to [-1, 1], and make eps agree.
        guide: (x, unclamped x0, alpha_bar [B]) -> scale times the gradient of classifier guidance; eps
            becomes eps - sqrt(1 - alpha_bar) * that, and x0 follows without another clamp.
        prev_x0: x0 of each sample's previous step, where ``has_prev`` (bool [B]) says that there was one:
            the second-order multistep rule of DPM-Solver++ (2M, arXiv 2211.01095, algorithm 2), which
            is this step along x0 extrapolated from both. None: first order, DDIM.

    Returns:
        The latents at the next level, and x0.
    """
    at = Coefficients.of(steps, k, x)
    x0 = unclamped = predict_x0(x, eps, at)
    if clip is True:
        x0 = unclamped.clamp(-1, 1)
        eps = predict_eps(x, x0, at)
    elif clip is not False:
        is_clipped = _per_sample(clip, x)
        x0 = torch.where(is_clipped, unclamped.clamp(-1, 1), unclamped)
        eps = torch.where(is_clipped, predict_eps(x, x0, at), eps)
    if guide is not None:
        eps = eps - at.noise_from * guide(x, unclamped, steps.alpha_bar_from[k])
        x0 = predict_x0(x, eps, at)
    estimate = x0
    if prev_x0 is not None and has_prev is not None:
        weight = torch.where(_per_sample(has_prev, x), at.extrapolation, 0.0)
        x0 = x0 + weight * (x0 - prev_x0)
        eps = torch.where(weight > 0, predict_eps(x, x0, at), eps)
    return ddim_update(x0, eps, at), estimate


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One number a sample, as what meets x [B, ...]."""
    return values.to(x.device).view(-1, *[1] * (x.ndim - 1))
