"""Outlier scores as z-scores among InD.

Scores of different detectors have no common unit, but their ranks among InD calibration images do: each score is
mapped to a p-value, and the p-value to a z-score, which is standard normal for InD images.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri_exp

from diffguard.calibration.conformal import Array, numbers
from diffguard.errors import DataError


def z_scores(calibration: ArrayLike, scores: ArrayLike) -> Array:
    """Map outlier scores to z-scores: monotone, and standard normal for InD images.

    z is the normal quantile of 1 - p with the mid-rank p = (#{c > s} + #{c = s} / 2 + 1/2) / (n + 1). Above the
    largest calibration score, where all ranks are equal, p decays as exp(-(s - largest) / tau): an exponential tail
    whose scale tau is the mean excess of the largest tenth of the calibration scores over the next smaller one.

    Args:
        calibration: InD outlier scores [n], finite.
        scores: outlier scores [B].

    Returns:
        [B], higher = more OOD.

    Raises:
        DataError: a score is NaN, a calibration score is infinite, or there are none.

    Example:
        >>> z_scores(range(99), [49.0, 200.0, 300.0]).round(2)
        array([0.  , 6.49, 8.82])
    """
    return upper_quantiles(log_p_values(calibration, scores))


def calibration_z_scores(calibration: ArrayLike) -> Array:
    """Map calibration scores [n] themselves to z-scores [n], each among the n - 1 others (leave-one-out).

    Example:
        >>> calibration_z_scores([1.0, 2.0, 3.0]).round(2)
        array([-0.32,  0.32,  1.69])
    """
    return upper_quantiles(calibration_log_p_values(calibration))


def log_p_values(calibration: ArrayLike, scores: ArrayLike) -> Array:
    """The logarithms [B] of the p-values behind `z_scores`."""
    ordered, scores = _ordered(calibration), numbers("scores", scores)
    p = _mid_ranks(ordered, scores) / (len(ordered) + 1)
    excess = np.maximum(scores - ordered[-1], 0)
    # In the logarithm, since p itself would soon underflow to 0.
    return np.asarray(np.log(p) - excess / _mean_excess(ordered))


def calibration_log_p_values(calibration: ArrayLike) -> Array:
    """The logarithms [n] of the p-values behind `calibration_z_scores`.

    Ranks among the n - 1 others are divided by n + 1, like those of a new image among n: at the same rank neither is
    more OOD than the other, so that a threshold on the fused scores keeps its coverage guarantee.

    Raises:
        DataError: a score is NaN or infinite, or there are fewer than 2.
    """
    scores = numbers("calibration", calibration)
    ordered, n = _ordered(scores), len(scores)
    if n < 2:
        raise DataError(f"calibration: leave-one-out needs at least 2 scores, there are {n}")
    # The half that a score counts as its own tie is taken off.
    log_p = np.log((_mid_ranks(ordered, scores) - 0.5) / (n + 1))
    if ordered[-2] < ordered[-1]:
        rest = ordered[:-1]
        log_p[scores == ordered[-1]] -= (ordered[-1] - rest[-1]) / _mean_excess(rest)
    return np.asarray(log_p)


def upper_quantiles(log_p: Array) -> Array:
    """The values that a standard normal variable exceeds with probability p."""
    return np.asarray(0.0 - ndtri_exp(log_p))


def _ordered(calibration: ArrayLike) -> Array:
    ordered = np.sort(numbers("calibration", calibration))
    if not len(ordered) or not np.isfinite(ordered[[0, -1]]).all():
        raise DataError("calibration: there is no score, or one is infinite")
    return ordered


def _mid_ranks(ordered: Array, scores: Array) -> Array:
    """#{c > s} + #{c = s} / 2 + 1/2 of sorted calibration scores c and each score s."""
    below, up_to = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return np.asarray(len(ordered) - (below + up_to) / 2 + 0.5)


def _mean_excess(ordered: Array) -> float:
    """The mean excess of the largest tenth of the scores over the next smaller score; of ties, over a different one."""
    n = len(ordered)
    rest = n - int(np.ceil(n / 10))
    under = min(rest, int(np.searchsorted(ordered, ordered[-1], side="left"))) - 1
    # If all scores are equal, there is no scale to estimate.
    return 1.0 if under < 0 else float((ordered[under + 1 :] - ordered[under]).mean())
