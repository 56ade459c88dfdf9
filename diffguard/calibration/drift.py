"""Whether a detector keeps its promise on images of production, and whether they look as its calibration did.

The promise is of InD images, at most alpha of which are taken for OOD, and it is over draws of the calibration
images too: of n, those at hand may by chance give another rate for good, beta-distributed around alpha with a
standard deviation of about sqrt(alpha (1 - alpha) / n). That is no news of production, so all that is said here
allows for it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, kstest, kstwobign

from diffguard.calibration.conformal import Array, Conformal, rejected_rank
from diffguard.errors import DataError

DRAWS = 20_000
"""Of calibration sets, to tell what such a set may do by chance."""


@dataclass(frozen=True)
class Rejection:
    """How many images were taken for OOD, and how many should have been.

    Attributes:
        count, images: rejected, and all. low, high: the 95 % interval of their ratio (Clopper and Pearson 1934).
        expected: the rate that was promised, in (0, 1).
        allowed: the highest rate that still is no news: what calibration sets of this size do by chance in
            97.5 % of cases; `expected` itself, if that is a rate that was seen and not a promise.
        allowed_low: the lowest such rate.
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
        """The share of images that were rejected."""
        return self.count / self.images

    @property
    def is_above(self) -> bool:
        """Whether the promise is broken: more than expected, and neither these images nor calibration by chance."""
        return self.low > self.expected and self.rate > self.allowed

    @property
    def is_below(self) -> bool:
        """Whether fewer are rejected than chance explains: no promise is broken, but something has changed."""
        return self.high < self.expected and self.rate < self.allowed_low


def rejection(
    conformal: Conformal, scores: ArrayLike, predicted: ArrayLike, expected: float | None = None
) -> Rejection:
    """The rejection rate of images, against the promised one.

    Args:
        scores: outlier scores [B]. predicted: predicted labels [B].
        expected: the rate to compare with, as one seen before; None: the promised alpha.

    Raises:
        DataError: there are no images, or a score is not a number.

    Example:
        >>> fitted = Conformal.fit(range(99), [0] * 99, alpha=0.05)
        >>> found = rejection(fitted, [200.0] * 14 + [0.0] * 86, [0] * 100)
        >>> found.rate, round(found.low, 3), round(found.allowed, 2), found.is_above
        (0.14, 0.079, 0.12, True)
    """
    rejected = conformal.rejects(scores, predicted)
    if not len(rejected):
        raise DataError("scores: there are none")
    count, images = int(rejected.sum()), len(rejected)
    interval = binomtest(count, images).proportion_ci(0.95, method="exact")
    if expected is None:
        lowest, highest = _by_chance(conformal, predicted)
        expected = conformal.alpha
    else:
        lowest = highest = expected
    return Rejection(count, images, float(interval.low), float(interval.high), expected, highest, lowest)


@dataclass(frozen=True)
class Uniformity:
    """Conformal p-values against the uniform distribution that InD images have.

    Attributes:
        statistic: Kolmogorov-Smirnov's, the largest distance of the two distribution functions, in [0, 1].
        p_value: of that, if production and calibration images are of one kind.
        counts: images in each of as many equal parts of (0, 1], [bins].
        effective: the number of images that would vary as much, were the calibration set infinite.
    """

    statistic: float
    p_value: float
    counts: NDArray[np.int64]
    effective: float


def uniformity(
    conformal: Conformal, scores: ArrayLike, predicted: ArrayLike, *, seed: int = 0, bins: int = 20
) -> Uniformity:
    """Kolmogorov-Smirnov test of p-values, ties broken at random.

    Conformal p-values are discrete, k / (n + 1); with random ties (`conformal_p_values`)
    they are exactly uniform. Those of one calibration set vary together: of a group of m images with n calibration
    images the distribution function varies as that of m n / (m + n) images would, as in the two-sample test, and
    groups add up by their shares. The test's p-value is that of many images, and on the safe side for few.

    Args:
        scores: outlier scores [B]. predicted: predicted labels [B].
        seed: of the random ties, so that the same scores always give the same figures.
        bins: of the histogram.

    Raises:
        DataError: there are no images, or a score is not a number.

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
    # Bins are (low, high]: p = alpha is a rejection.
    places = np.ceil(values * bins - 1e-12).astype(int).clip(1, bins) - 1
    counts = np.bincount(places, minlength=bins)
    return Uniformity(statistic, float(kstwobign.sf(statistic / np.sqrt(variance))), counts, float(1 / variance))


def _by_chance(conformal: Conformal, predicted: ArrayLike) -> tuple[float, float]:
    """Between which rates 95 % of calibration sets of this size reject so many InD images."""
    rng = np.random.default_rng(0)
    total: Array = np.zeros(DRAWS)
    for n, m in conformal.groups(predicted):
        above = rejected_rank(n, conformal.alpha)
        total += rng.binomial(m, rng.beta(above, n + 1 - above, DRAWS))
    low, high = np.quantile(total, [0.025, 0.975], method="nearest") / len(np.asarray(predicted))
    return float(low), float(high)
