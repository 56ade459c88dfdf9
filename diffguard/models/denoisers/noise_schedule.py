"""Cumulative alphas of a denoiser's training."""

from typing import Any

import torch
from torch import Tensor


def make_scheduler(
    schedule: str, beta_start: float, beta_end: float, steps: int = 1000, *, learned_variance: bool = False
) -> Any:
    """The Diffusers scheduler of so many training steps with this beta schedule."""
    from diffusers import DDPMScheduler

    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        variance_type=variance,
    )


def cumulative_alphas(scheduler: Any) -> Tensor:
    """A Diffusers scheduler's cumulative alphas in float64, shape [T].

    For betas that are linear, or linear in their root, they are computed anew: Diffusers rounds
    betas to float32, the published implementations do not.
    """
    config = scheduler.config
    steps = int(config.num_train_timesteps)
    rescaled = getattr(config, "rescale_betas_zero_snr", False)
    if rescaled or config.trained_betas is not None or config.beta_schedule not in ("linear", "scaled_linear"):
        alphas: Tensor = scheduler.alphas_cumprod.double().cpu()
        # With zero terminal SNR (arXiv 2305.08891) the last is 0, by which nothing can be divided; as Diffusers' Euler.
        return torch.where(alphas > 0, alphas, 2.0**-24)
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
    roots = torch.linspace(config.beta_start**power, config.beta_end**power, steps, dtype=torch.float64)
    return (1 - roots ** (1 / power)).cumprod(dim=0)
