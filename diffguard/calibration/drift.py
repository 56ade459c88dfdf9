"""Drift: whether a detector's coverage guarantee holds on production images, and whether their scores have changed.

The guarantee is that at most a share alpha of InD images is taken for OOD, on average over draws of the calibration
images too. One calibration set of n images has, by chance, another rate for good, beta-distributed around alpha with a
standard deviation of about sqrt(alpha (1 - alpha) / n). That is not drift of production, and all tests here allow for
it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, kstest, kstwobign

from diffguard.calibration.conformal import Array, Conformal, rejected_rank
from diffguard.errors import DataError

DRAWS = 20_000
"""Simulated calibration sets, from which the rates that occur by chance are estimated."""


@dataclass(frozen=True)
class Rejection:
    """The observed rejection rate of images, and the rate to expect.

    Attributes:
        count, images: rejected images, and all images.
        low, high: the 95 % interval of their ratio (Clopper and Pearson 1934).
        expected: the guaranteed false-rejection rate alpha, or an observed rate to compare with, in (0, 1).
        allowed: the highest rate that chance explains: the 97.5 % quantile over calibration sets of this size;
            `expected` itself if that is an observed rate.
        allowed_low: the lowest such rate, the 2.5 % quantile.
    """

    count: int
    images: int
    low: float
    high: float
    expected: float
    allowed: float
    allowed_low: float

    @property
    def rate(self) -> float:
        """The share of images that were rejected, in [0, 1]."""
        return self.count / self.images

    @property
    def is_above(self) -> bool:
        """Whether the guarantee is broken: a higher rate than chance in these images or in calibration explains."""
        return self.low > self.expected and self.rate > self.allowed

    @property
    def is_below(self) -> bool:
        """Whether the rate is lower than chance explains: the guarantee holds, but the images have changed."""
        return self.high < self.expected and self.rate < self.allowed_low


def rejection(
    conformal: Conformal, scores: ArrayLike, predicted: ArrayLike, expected: float | None = None
) -> Rejection:
    """Compare the rejection rate of images with the guaranteed one.

    Args:
        scores: outlier scores [B].
        predicted: predicted labels [B].
        expected: an observed rate to compare with instead, in (0, 1); None: the guaranteed alpha.

    Raises:
        DataError: there are no images, or a score is NaN.

    Example:
        >>> fitted = Conformal.fit(range(99), [0] * 99, alpha=0.05)
        >>> result = rejection(fitted, [200.0] * 14 + [0.0] * 86, [0] * 100)
        >>> result.rate, round(result.low, 3), round(result.allowed, 2), result.is_above
        (0.14, 0.079, 0.12, True)
    """
    rejected = conformal.rejects(scores, predicted)
    if not len(rejected):
        raise DataError("scores: there are none")
    count, images = int(rejected.sum()), len(rejected)
    interval = binomtest(count, images).proportion_ci(0.95, method="exact")
    if expected is None:
        lowest, highest = _rates_by_chance(conformal, predicted)
        expected = conformal.alpha
    else:
        lowest = highest = expected
    return Rejection(count, images, float(interval.low), float(interval.high), expected, highest, lowest)


@dataclass(frozen=True)
class Uniformity:
    """Conformal p-values compared with the uniform distribution, which those of InD images have.

    Attributes:
        statistic: Kolmogorov-Smirnov's, the largest difference of the two distribution functions, in [0, 1].
        p_value: of the statistic, under the hypothesis that production and calibration images are exchangeable.
        counts: images in each of `bins` equal parts of (0, 1], [bins].
        effective: the number of images with the same variance if the calibration set were infinite.
    """

    statistic: float
    p_value: float
    counts: NDArray[np.int64]
    effective: float


def uniformity(
    conformal: Conformal, scores: ArrayLike, predicted: ArrayLike, *, seed: int = 0, bins: int = 20
) -> Uniformity:
    """Test whether conformal p-values are uniform (Kolmogorov-Smirnov), with ties broken at random.

    Conformal p-values are discrete, k / (n + 1); with random ties (`conformal_p_values`) they are exactly uniform.
    P-values from one calibration set are dependent: in a group of m images and n calibration images the distribution
    function varies as that of m n / (m + n) images, as in the two-sample test, and the variances of the groups add up
    by their shares. The test's p-value is asymptotic, and conservative for few images.

    Args:
        scores: outlier scores [B].
        predicted: predicted labels [B].
        seed: of the random ties, so that the same scores give the same figures.
        bins: number of bins of the histogram.

    Raises:
        DataError: there are no images, or a score is NaN.

    Example:
        >>> fitted = Conformal.fit(range(99), [0] * 99, alpha=0.05)
        >>> uniformity(fitted, range(99), [0] * 99, bins=3).counts.tolist()
        [32, 34, 33]
    """
    values = conformal.p_values(scores, predicted, np.random.default_rng(seed))
    if not len(values):
        raise DataError("scores: there are none")
    groups = conformal.groups(predicted)
    variance = sum((m / len(values)) ** 2 * (1 / m + 1 / (n + 2)) for n, m in groups)
    statistic = float(kstest(values, "uniform").statistic)
    # Bins are (low, high], since p = alpha is a rejection.
    indices = np.ceil(values * bins - 1e-12).astype(int).clip(1, bins) - 1
    counts = np.bincount(indices, minlength=bins)
    return Uniformity(statistic, float(kstwobign.sf(statistic / np.sqrt(variance))), counts, float(1 / variance))


def _rates_by_chance(conformal: Conformal, predicted: ArrayLike) -> tuple[float, float]:
    """The 95 % interval of the rejection rate of this number of InD images, over calibration sets of this size."""
    rng = np.random.default_rng(0)
    total: Array = np.zeros(DRAWS)
    for n, m in conformal.groups(predicted):
        rank = rejected_rank(n, conformal.alpha)
        total += rng.binomial(m, rng.beta(rank, n + 1 - rank, DRAWS))
    low, high = np.quantile(total, [0.025, 0.975], method="nearest") / len(np.asarray(predicted))
    return float(low), float(high)
