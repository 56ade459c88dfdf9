"""Deterministic DDIM: the noise levels that sampling visits, and the arithmetic of one move.

Notation as in the DDIM paper (arXiv 2010.02502, section 4.1) with eta = 0: ``abar`` is the
cumulative alpha of a level, ``eps`` the predicted noise, ``x0`` the estimate of the clean latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.errors import SettingError


@dataclass(frozen=True)
class Grid:
    """The noise levels of one sampling schedule. Level 0 is the image, level K the noisiest.

    Attributes:
        abar: float64, shape [K + 1], in (0, 1]: cumulative alpha at each level.
        timesteps: int64, shape [K + 1]: the training timestep given to the network at each level.
            ``timesteps[0]`` is used by the first inversion step, which starts at the clean image.
    """

    abar: Tensor
    timesteps: Tensor

    @property
    def levels(self) -> int:
        """K, the number of the noisiest level."""
        return len(self.abar) - 1

    def abar_like(self, level: int, x: Tensor) -> Tensor:
        """abar at a level as a scalar tensor of x's type and device."""
        return self.abar[level].to(x)


def even_grid(alphas_cumprod: Tensor, levels: int) -> Grid:
    """The trailing grid of K even strides: level k is training timestep k * T/K - 1.

    Level 0 is the clean image (abar 1); no timestep belongs to it, so the network is asked half a
    stride up, between it and level 1.

    Args:
        alphas_cumprod: the denoiser's cumulative alphas, shape [T].
        levels: K, a divisor of T.

    Raises:
        SettingError: K does not divide T, or is out of range.

    Example:
        >>> grid = even_grid(torch.linspace(0.999, 0.001, 1000), levels=10)
        >>> grid.timesteps.tolist()
        [49, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    """
    steps = len(alphas_cumprod)
    if levels < 1 or steps % levels or steps // levels < 2:
        raise SettingError(f"levels: {levels} does not divide the denoiser's {steps} training steps into strides")
    stride = steps // levels
    timesteps = torch.cat([torch.tensor([stride // 2 - 1]), torch.arange(1, levels + 1) * stride - 1])
    abar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()[timesteps[1:]]])
    return Grid(abar=abar, timesteps=timesteps)


def predict_x0(x: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The clean latents that x and eps imply (DDIM, equation 9)."""
    return (x - (1 - abar).sqrt() * eps) / abar.sqrt()


def predict_eps(x: Tensor, x0: Tensor, abar: Tensor) -> Tensor:
    """The noise that x and x0 imply, the inverse of `predict_x0`."""
    return (x - abar.sqrt() * x0) / (1 - abar).sqrt()


def ddim_move(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The latents at the level of abar along eps (DDIM, equation 12, eta = 0)."""
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
