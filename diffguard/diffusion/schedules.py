"""The timesteps and noise levels that sampling visits.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1): ``alpha_bar`` is the cumulative alpha of a noise level.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffguard.errors import SettingError


@dataclass(frozen=True)
class Steps:
    """The K steps of one direction, in the order of their index.

    Attributes:
        timestep: int64 [K]: the training timestep at which the network is evaluated.
        alpha_bar_from: float64 [K], in (0, 1]: of the level that the step leaves.
        alpha_bar_to: float64 [K], in [0, 1]: of the level that it reaches.
    """

    timestep: Tensor
    alpha_bar_from: Tensor
    alpha_bar_to: Tensor

    @cached_property
    def timesteps(self) -> list[int]:
        """`timestep` as plain numbers."""
        return [int(timestep) for timestep in self.timestep]

    @cached_property
    def extrapolation(self) -> Tensor:
        """float64 [K]: how far a second-order step extrapolates from the x0 of the step before through its own.

        h / (2 h_previous) of half log-SNR; 0 where a step begins or ends at a level without noise, or
        of noise alone, or has none before it.
        """
        h = (torch.logit(self.alpha_bar_to) - torch.logit(self.alpha_bar_from)) / 2
        none = torch.full_like(h[:1], torch.inf)
        is_inversion = self.alpha_bar_from > self.alpha_bar_to
        previous = torch.where(is_inversion, torch.cat([none, h[:-1]]), torch.cat([h[1:], none]))
        weight = h / (2 * previous)
        return torch.where(h.isfinite() & previous.isfinite(), weight, 0.0)

    @cached_property
    def coefficients(self) -> Tensor:
        """float64 [K, 6]: what a step multiplies latents by, computed once; see `diffguard.diffusion.ddim`.

        The columns are sqrt(1 / a), sqrt(1 / a - 1) and sqrt(1 - a) of a = `alpha_bar_from`, then sqrt(b) and
        sqrt(1 - b) of b = `alpha_bar_to`, rounded to float32 before its roots, and `extrapolation`.
        """
        leaving, reaching = self.alpha_bar_from, self.alpha_bar_to.float()
        columns = [(1 / leaving).sqrt(), (1 / leaving - 1).sqrt(), (1 - leaving).sqrt()]
        columns += [reaching.sqrt(), (1 - reaching).sqrt(), self.extrapolation]
        return torch.stack([column.double() for column in columns], dim=1)


@dataclass(frozen=True)
class Schedule:
    """One sampling schedule: inversion steps from index 0 up, denoising steps down to index 0."""

    inversion: Steps
    denoising: Steps

    @cached_property
    def levels(self) -> int:
        """K: how many steps lead from the image to the noisiest level."""
        return len(self.inversion.timestep)

    @cached_property
    def both(self) -> Steps:
        """The steps of inversion, and after them those of denoising: its index k is `levels` + k here."""
        pairs = zip(_columns(self.inversion), _columns(self.denoising), strict=True)
        return Steps(*(torch.cat(pair) for pair in pairs))

    def start(self, level: Tensor, forback_skip_diff: int, skip_first_steps: int) -> Tensor:
        """`denoising_start` of samples at these levels, int64 [B]."""
        starts = [denoising_start(one, self.levels, forback_skip_diff, skip_first_steps) for one in level.tolist()]
        return torch.tensor(starts, device=level.device)


def _columns(steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    return steps.timestep, steps.alpha_bar_from, steps.alpha_bar_to


def denoising_start(level: int, levels: int, forback_skip_diff: int, skip_first_steps: int) -> int:
    """The index of the first denoising step of a sample whose inversion stopped at a level; see `Variant`.

    Args:
        levels: K, of the schedule.

    Example:
        >>> [denoising_start(level, 10, forback_skip_diff=1, skip_first_steps=0) for level in (1, 4, 10)]
        [0, 3, 9]
    """
    if forback_skip_diff == 0:
        return levels - 1 - skip_first_steps
    return min(max(level + forback_skip_diff - 2, 0), levels - 1)


def trailing_schedule(alphas_cumprod: Tensor, levels: int) -> Schedule:
    """K even strides that end at the last training step: level k is timestep k * T/K - 1.

    Level 0 is the clean image (alpha_bar 1). No timestep belongs to it, so the first inversion step evaluates
    the network half a stride up, between it and level 1.

    Args:
        alphas_cumprod: the denoiser's cumulative alphas, shape [T].
        levels: K, a divisor of T.

    Raises:
        SettingError: K does not divide T, or is out of range.

    Example:
        >>> schedule = trailing_schedule(torch.linspace(0.999, 0.001, 1000), levels=10)
        >>> schedule.inversion.timestep.tolist()
        [49, 99, 199, 299, 399, 499, 599, 699, 799, 899]
        >>> schedule.denoising.timestep.tolist()
        [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    """
    train_steps = len(alphas_cumprod)
    if levels < 1 or train_steps % levels or train_steps // levels < 2:
        raise SettingError(f"levels: {levels} does not divide the denoiser's {train_steps} training steps into strides")
    stride = train_steps // levels
    denoising = torch.arange(1, levels + 1) * stride - 1
    inversion = torch.cat([torch.tensor([stride // 2 - 1]), denoising[:-1]])
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()[denoising]])
    lower, upper = alpha_bar[:-1], alpha_bar[1:]
    return Schedule(Steps(inversion, lower, upper), Steps(denoising, upper, lower))


def guided_diffusion_schedule(alphas_cumprod: Tensor, levels: int) -> Schedule:
    """The "ddimK" schedule of guided-diffusion: t_k = k * s, s the smallest stride that makes K steps.

    The image is taken for the latents at index 0. Inversion evaluates the network at t_k and steps to
    index k + 1 (alpha_bar 0 after the last); denoising steps from index k to k - 1 (alpha_bar 1 after the last).

    Raises:
        SettingError: no stride makes K steps.

    Example:
        >>> guided_diffusion_schedule(torch.linspace(0.999, 0.001, 1000), 20).denoising.timestep[-1]
        tensor(950)
    """
    train_steps = len(alphas_cumprod)
    stride = next((s for s in range(1, train_steps) if len(range(0, train_steps, s)) == levels), None)
    if stride is None:
        raise SettingError(f"levels: no stride makes {levels} of the denoiser's {train_steps} training steps")
    timestep = torch.arange(0, train_steps, stride)
    alpha_bar = alphas_cumprod.double().cpu()[timestep]
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    # The published first inversion step takes alpha_bar in float32, where 1 - alpha_bar is 1e-4 and rounds by
    # 1e-4 of it.
    inversion_from = torch.cat([alpha_bar[:1].float().double(), alpha_bar[1:]])
    return Schedule(
        Steps(timestep, inversion_from, torch.cat([alpha_bar[1:], zero])),
        Steps(timestep, alpha_bar, torch.cat([one, alpha_bar[:-1]])),
    )


def latent_diffusion_schedule(alphas_cumprod: Tensor, levels: int) -> Schedule:
    """The schedule of latent diffusion's DDIM sampler: t_i = i * (T // K) + 1, alpha_bar rounded to float32.

    Both directions evaluate the network at the noisier of a step's two levels. Below the first is alpha_bar of
    training step 0, not 1. Where K does not divide T there are more than K steps; T itself is left out.

    Raises:
        SettingError: K is out of range.

    Example:
        >>> latent_diffusion_schedule(torch.linspace(0.999, 0.001, 1000), 25).inversion.timestep[-1]
        tensor(961)
    """
    train_steps = len(alphas_cumprod)
    if not 1 <= levels <= train_steps:
        raise SettingError(f"levels: {levels} is not within 1..{train_steps}, the denoiser's training steps")
    timestep = torch.arange(0, train_steps, train_steps // levels) + 1
    timestep = timestep[timestep < train_steps]
    rounded = alphas_cumprod.float().double().cpu()
    alpha_bar = rounded[timestep]
    below = torch.cat([rounded[:1], alpha_bar[:-1]])
    return Schedule(Steps(timestep, below, alpha_bar), Steps(timestep, alpha_bar, below))


SCHEDULES: dict[str, Callable[[Tensor, int], Schedule]] = {
    "trailing": trailing_schedule,
    "guided-diffusion": guided_diffusion_schedule,
    "latent-diffusion": latent_diffusion_schedule,
}
"""By the name that a variant's setting ``grid`` has."""
