"""Statistics of the inversion path: how strong the predicted noise is on the way, and how fast it changes.

DiffPath (arXiv 2405.11881, its 6D variant; NeurIPS 2024) on the inversion that DiffGuard makes anyway, so
that it costs no network evaluation of its own. Of eps_j, the noise predicted for step j = 1..n of an
inversion (guided as the inversion is, before the estimate of the clean latents is clamped), at
training timestep t_j of T, and with the mean over the d elements of the latents,

    S_p = sum_j mean(eps_j^p),    D_p = sum_j>1 mean(((eps_j - eps_j-1) / ((t_j - t_j-1) / T))^p),    p = 1, 2, 3.

Differences are per unit of the schedule's time, of which the whole schedule is 1: grids have strides
that differ (the first of `trailing` is half of the others), and a finer one takes smaller steps of the
same path. Means, where the paper has sums: magnitudes do not depend on the size of the latents.

A score is the negative log-likelihood of the six under a Gaussian of InD images' (the paper: a Gaussian
mixture). They are what the denoiser was trained on, never the images that set a threshold: scores of
images that the Gaussian was fitted on are too low for others to be measured by.
"""

import torch
from torch import Tensor

from diffguard.errors import SettingError
from diffguard.settings import PathGaussian

PATH_STATISTICS = 6
"""S_1, S_2, S_3, D_1, D_2, D_3."""

SHRINKAGE = 0.01
"""Share of the covariance that is taken from its diagonal, so that it can be inverted."""

MOST_IMAGES = 2000
"""That a Gaussian is fitted on; more change nothing that can be seen."""


def path_gaps(timestep: Tensor, train_steps: int) -> Tensor:
    """Between each step's timestep and the one before, in units of the schedule's time.

    Args:
        timestep: int64 [K], of the inversion steps.
        train_steps: T.

    Returns:
        float64 [K], the first infinite: nothing changes before it.

    Example:
        >>> path_gaps(torch.tensor([49, 99, 199]), 1000)
        tensor([   inf, 0.0500, 0.1000], dtype=torch.float64)
    """
    gaps = torch.full((len(timestep),), torch.inf, dtype=torch.float64)
    gaps[1:] = timestep.diff().double().cpu() / train_steps
    return gaps


def path_terms(eps: Tensor, prev_eps: Tensor, gap: Tensor) -> Tensor:
    """What one step adds to the six sums S_1, S_2, S_3, D_1, D_2, D_3.

    Args:
        eps: predicted noise [B, ...].
        prev_eps: of the step before, likewise; anything finite where
            there is none. gap: float64 [B], of `path_gaps`.

    Returns:
        float64 [B, 6], on the CPU.
    """
    eps, prev_eps = eps.flatten(1).float(), prev_eps.flatten(1).float()
    slope = (eps - prev_eps) / gap.to(eps.device, eps.dtype)[:, None]
    powers = [values**p for values in (eps, slope) for p in (1, 2, 3)]
    return torch.stack([values.mean(dim=1) for values in powers], dim=1).cpu().double()


def fit_path(statistics: Tensor) -> PathGaussian:
    """The Gaussian of InD images' statistics, its covariance shrunk to its diagonal by `SHRINKAGE`.

    Args:
        statistics: float64 [N, 6], of images that the denoiser may have been trained on.

    Raises:
        SettingError: there are no more images than statistics.
    """
    if len(statistics) < 7:
        raise SettingError(
            f"distance path: its Gaussian of 6 statistics is fitted on at least 7 images; there are {len(statistics)}"
        )
    covariance = torch.cov(statistics.T)
    diagonal = covariance.diagonal().clamp(min=1e-12).diag()
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal
    return PathGaussian(mean=statistics.mean(dim=0).tolist(), covariance=covariance.tolist())


def path_score(gaussian: PathGaussian, statistics: Tensor) -> Tensor:
    """Negative log-likelihood up to the Gaussian's constant: half the squared Mahalanobis distance.

    Args:
        statistics: float64 [B, 6].

    Returns:
        float64 [B], from 0 up, higher = more OOD.
    """
    root = torch.linalg.cholesky(torch.tensor(gaussian.covariance, dtype=torch.float64))
    away = statistics - torch.tensor(gaussian.mean, dtype=torch.float64)
    whitened: Tensor = torch.linalg.solve_triangular(root, away.T, upper=False)
    return whitened.square().sum(dim=0) / 2
