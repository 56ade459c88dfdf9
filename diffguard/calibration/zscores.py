"""Outlier scores as z-scores among InD.

Scores of different detectors have no common unit. Their ranks among InD calibration images do: each score
becomes a p-value and that a z-score, standard normal for InD images.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri_exp

from diffguard.calibration.conformal import Array, numbers
from diffguard.errors import DataError


def z_scores(calibration: ArrayLike, scores: ArrayLike) -> Array:
    """Outlier scores as z-scores among InD: monotone, and standard normal for InD images.

    z is the normal quantile of 1 - p with the mid-rank p = (#{c > s} + #{c = s} / 2 + 1/2) / (n + 1). Above the
    largest calibration score, where every rank is the same, p falls on as exp(-(s - largest) / tau), the
    exponential tail of a mean excess tau, that of the largest tenth over the score under them.

    Args:
        calibration: InD outlier scores [n], finite.
        scores: outlier scores [B].

    Returns:
        [B], higher = more OOD.

    Raises:
        DataError: a score is not a number, or there is no finite calibration score.

    Example:
        >>> z_scores(range(99), [49.0, 200.0, 300.0]).round(2)
        array([0.  , 6.49, 8.82])
    """
    return upper_quantiles(log_p_values(calibration, scores))


def calibration_z_scores(calibration: ArrayLike) -> Array:
    """The z-scores of calibration images themselves, each among the n - 1 others (leave-one-out). [n].

    Example:
        >>> calibration_z_scores([1.0, 2.0, 3.0]).round(2)
        array([-0.32,  0.32,  1.69])
    """
    return upper_quantiles(calibration_log_p_values(calibration))


def log_p_values(calibration: ArrayLike, scores: ArrayLike) -> Array:
    """The logarithms of the p-values that `z_scores` is of. [B]."""
    ordered, scores = _ordered(calibration), numbers("scores", scores)
    p = _mid_ranks(ordered, scores) / (len(ordered) + 1)
    excess = np.maximum(scores - ordered[-1], 0)
    # From its logarithm on, since p itself is soon 0 in floating point.
    return np.asarray(np.log(p) - excess / _mean_excess(ordered))


def calibration_log_p_values(calibration: ArrayLike) -> Array:
    """The logarithms of the p-values that `calibration_z_scores` is of. [n].

    Ranks among n - 1 others are put over n + 1 as a new image's among n are: of the same rank, neither is more
    OOD than the other, and a threshold on the fused scores holds its promise.
    """
    scores = numbers("calibration", calibration)
    ordered, n = _ordered(scores), len(scores)
    if n < 2:
        raise DataError(f"calibration: leave-one-out needs at least 2 scores, there are {n}")
    # Without itself an image loses the half that it counts as its own tie.
    found = np.log((_mid_ranks(ordered, scores) - 0.5) / (n + 1))
    if ordered[-2] < ordered[-1]:
        rest = ordered[:-1]
        found[scores == ordered[-1]] -= (ordered[-1] - rest[-1]) / _mean_excess(rest)
    return np.asarray(found)


def upper_quantiles(log_p: Array) -> Array:
    """What a standard normal variable exceeds with probability p."""
    return np.asarray(0.0 - ndtri_exp(log_p))


def _ordered(calibration: ArrayLike) -> Array:
    ordered = np.sort(numbers("calibration", calibration))
    if not len(ordered) or not np.isfinite(ordered[[0, -1]]).all():
        raise DataError("calibration: there is no score, or one is infinite")
    return ordered


def _mid_ranks(ordered: Array, scores: Array) -> Array:
    """#{c > s} + #{c = s} / 2 + 1/2."""
    below = np.searchsorted(ordered, scores, side="left"), np.searchsorted(ordered, scores, side="right")
    return np.asarray(len(ordered) - (below[0] + below[1]) / 2 + 0.5)


def _mean_excess(ordered: Array) -> float:
    """Of the largest tenth of the scores over the one under them; if those are one, over the next that differs."""
    n = len(ordered)
    rest = n - int(np.ceil(n / 10))
    under = min(rest, int(np.searchsorted(ordered, ordered[-1], side="left"))) - 1
    # Without any other score nothing is known of their unit.
    return 1.0 if under < 0 else float((ordered[under + 1 :] - ordered[under]).mean())
