"""Statistics of the inversion path: the magnitude of the predicted noise along it, and its rate of change.

DiffPath (arXiv 2405.11881, its 6D variant; NeurIPS 2024) on DiffGuard's inversion, so that it needs no further network
evaluation. Let eps_j be the noise predicted in step j = 1..n of an inversion (guided as the inversion is, before the
estimate of the clean latents is clamped), at training timestep t_j of T, and let the mean be over the elements of the
latents:

    S_p = sum_j mean(eps_j^p),    D_p = sum_j>1 mean(((eps_j - eps_j-1) / ((t_j - t_j-1) / T))^p),    p = 1, 2, 3.

Differences are divided by the elapsed fraction of the schedule, since strides differ (the first of `trailing` is half
of the others) and a finer grid takes smaller steps along the same path. Means instead of the paper's sums make the
statistics independent of the size of the latents.

The score is the negative log-likelihood of the six statistics under a Gaussian fitted on InD images, or, as in the
paper, a mixture of several. These are the denoiser's training images, never the images that set a
threshold: images on which a density was fitted score too low to calibrate others.
"""

import math

import torch
from torch import Tensor

from diffguard.errors import SettingError
from diffguard.settings import PathDensity, PathGaussian, PathMixture

PATH_STATISTICS = 6
"""S_1, S_2, S_3, D_1, D_2, D_3."""

SHRINKAGE = 0.01
"""Weight of the covariance's diagonal in its estimate, which makes it invertible; of a mixture, what each component's
variances get on top, in shares of those of all images."""

MIXTURE_STARTS = 5
"""A mixture is fitted from so many k-means starts, and the likeliest is taken: rounding of the statistics may move a
start, and seldom moves the best end of several."""

MOST_IMAGES = 2000
"""Most images on which a density is fitted; more do not change it visibly."""


def path_gaps(timestep: Tensor, train_steps: int) -> Tensor:
    """Return the difference of each step's timestep to the one before, as a fraction of the schedule.

    Args:
        timestep: int64 [K], of the steps of an inversion.
        train_steps: T.

    Returns:
        float64 [K]; the first is infinite, since no step precedes it.

    Example:
        >>> path_gaps(torch.tensor([49, 99, 199]), 1000)
        tensor([   inf, 0.0500, 0.1000], dtype=torch.float64)
    """
    gaps = torch.full((len(timestep),), torch.inf, dtype=torch.float64)
    gaps[1:] = timestep.diff().double().cpu() / train_steps
    return gaps


def path_terms(eps: Tensor, prev_eps: Tensor, gap: Tensor) -> Tensor:
    """Return what one step adds to the six sums S_1, S_2, S_3, D_1, D_2, D_3.

    Args:
        eps: predicted noise [B, ...].
        prev_eps: predicted noise of the step before, likewise; any finite values if there is none.
        gap: float64 [B], see `path_gaps`.

    Returns:
        float64 [B, 6], on the CPU.
    """
    eps, prev_eps = eps.flatten(1).float(), prev_eps.flatten(1).float()
    slope = (eps - prev_eps) / gap.to(eps.device, eps.dtype)[:, None]
    values = torch.stack([eps, slope], dim=1)
    squares = values * values
    powers = torch.stack([values, squares, squares * values], dim=2)  # [B, 2, 3, ...]
    return powers.mean(dim=3).flatten(1).cpu().double()


def fit_path(statistics: Tensor, components: int = 1) -> PathDensity:
    """Fit a Gaussian, or a mixture of several, to the statistics of InD images.

    The covariance of one is shrunk to its diagonal by `SHRINKAGE`. A mixture is fitted by EM (scikit-learn's, with a
    fixed seed) to standardized statistics.

    Args:
        statistics: float64 [N, 6]; the denoiser may have been trained on these images.
        components: how many Gaussians.

    Raises:
        SettingError: there are fewer than 7 images a component.
    """
    least = 7 * components
    if len(statistics) < least:
        density = "Gaussian" if components == 1 else f"mixture of {components} Gaussians"
        raise SettingError(
            f"distance path: its {density} of 6 statistics is fitted on at least {least} images; "
            f"there are {len(statistics)}"
        )
    return _fit_gaussian(statistics) if components == 1 else _fit_mixture(statistics, components)


def _fit_gaussian(statistics: Tensor) -> PathGaussian:
    covariance = torch.cov(statistics.T)
    diagonal = covariance.diagonal().clamp(min=1e-12).diag()
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal
    return PathGaussian(mean=statistics.mean(dim=0).tolist(), covariance=covariance.tolist())


def _fit_mixture(statistics: Tensor, components: int) -> PathMixture:
    from sklearn.mixture import GaussianMixture  # takes a second to import

    mean, scale = statistics.mean(dim=0), statistics.std(dim=0, correction=0).clamp(min=1e-6)
    mixture = GaussianMixture(
        components, reg_covar=SHRINKAGE, n_init=MIXTURE_STARTS, tol=1e-5, max_iter=1000, random_state=0
    )
    # k-means picks its first means by their place: sorted, the images' order does not count.
    mixture.fit(((statistics - mean) / scale)[statistics[:, 0].argsort()].numpy())
    means = torch.from_numpy(mixture.means_) * scale + mean
    covariances = torch.from_numpy(mixture.covariances_) * scale[:, None] * scale
    gaussians = zip(means.tolist(), covariances.tolist(), strict=True)
    return PathMixture(
        weights=tuple(mixture.weights_.tolist()),
        components=tuple(PathGaussian(mean=mean, covariance=covariance) for mean, covariance in gaussians),
    )


def path_score(density: PathDensity, statistics: Tensor) -> Tensor:
    """Return the negative log-likelihood: of one Gaussian without its constant, of a mixture with it.

    Args:
        statistics: float64 [B, 6].

    Returns:
        float64 [B]; higher = more OOD. Of one Gaussian half the squared Mahalanobis distance, at least 0; of a mixture
        any number.
    """
    if isinstance(density, PathGaussian):
        return _half_squared_distance(density, statistics)[0]
    terms = []
    for weight, gaussian in zip(density.weights, density.components, strict=True):
        half_squared_distance, log_volume = _half_squared_distance(gaussian, statistics)
        terms.append(math.log(weight) - log_volume - half_squared_distance)
    return PATH_STATISTICS / 2 * math.log(2 * math.pi) - torch.stack(terms).logsumexp(dim=0)


def _half_squared_distance(gaussian: PathGaussian, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared Mahalanobis distances [B], and half the logarithm of the covariance's determinant."""
    root = torch.linalg.cholesky(torch.tensor(gaussian.covariance, dtype=torch.float64))
    centered = statistics - torch.tensor(gaussian.mean, dtype=torch.float64)
    whitened: Tensor = torch.linalg.solve_triangular(root, centered.T, upper=False)
    return whitened.square().sum(dim=0) / 2, root.diagonal().log().sum()
