"""From InD calibration scores to p-values and decision thresholds, with a finite-sample coverage guarantee.

Split conformal prediction (arXiv 2107.07511) of outlier scores (arXiv 2104.08279): if a new InD image and the n
calibration images are exchangeable, its p-value is at most alpha with probability at most alpha, the false-rejection
rate; exactly floor(alpha (n + 1)) / (n + 1) if no scores tie. The probability is over draws of the calibration images
too: given one calibration set, the rate is beta-distributed around it. If a variant's stop is fitted on the calibration
images (`stop.median_at`), they are part of the detector, and the guarantee is approximate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffguard.errors import DataError, SettingError

Array = NDArray[np.float64]


def accept_threshold(calibration: ArrayLike, accept: float) -> float:
    """Return the smallest threshold that accepts at least a share of InD images; a score above it is OOD.

    It is the ceil(accept * (n + 1))-th smallest of n calibration scores, so that a new InD image is
    accepted with probability at least `accept` (split conformal prediction, arXiv 2107.07511).

    Args:
        calibration: InD outlier scores [n], of images that no model was trained on.
        accept: share of InD images to accept, in (0, 1).

    Raises:
        SettingError: accept is out of range, or n is too small to guarantee it.
        DataError: a score is NaN.

    Example:
        >>> accept_threshold(range(1, 100), accept=0.95)
        95.0
    """
    scores = np.sort(numbers("calibration", calibration))
    if not 0 < accept < 1:
        raise SettingError(f"calibrate.accept: {accept} is not between 0 and 1")
    rank = int(np.ceil(accept * (len(scores) + 1) - 1e-9))
    if rank > len(scores):
        needed = int(np.ceil(accept / (1 - accept) - 1e-9))
        raise SettingError(
            f"calibrate.accept: {accept:g} needs at least {needed} calibration images, there are {len(scores)}"
        )
    return float(scores[rank - 1])


def conformal_p_values(
    calibration: ArrayLike, scores: ArrayLike, rng: np.random.Generator | None = None
) -> NDArray[np.float64]:
    """Return the conformal p-values of scores among InD scores; small p-values are OOD.

    p = (1 + #{c >= s}) / (n + 1): ties count as larger scores, so that p is valid, if conservative. With a generator
    ties are broken at random, p = (#{c > s} + U (1 + #{c = s})) / (n + 1), which is exactly uniform for InD images
    (Vovk et al., Algorithmic Learning in a Random World, 2.2; Bates et al., arXiv 2104.08279).

    Args:
        calibration: InD outlier scores [n].
        scores: outlier scores [B].
        rng: breaks ties with one uniform number for each score; None: ties count as larger.

    Returns:
        [B], in (0, 1].

    Raises:
        DataError: a score is NaN.

    Example:
        >>> conformal_p_values([1.0, 2.0, 2.0], [0.5, 2.0, 3.0])
        array([1.  , 0.75, 0.25])
    """
    ordered, scores = np.sort(numbers("calibration", calibration)), numbers("scores", scores)
    n = len(ordered)
    at_least = n - np.searchsorted(ordered, scores, side="left")
    if rng is None:
        return np.asarray((1 + at_least) / (n + 1))
    above = n - np.searchsorted(ordered, scores, side="right")
    # 1 - random() is in (0, 1].
    return np.asarray((above + (1 - rng.random(len(scores))) * (1 + at_least - above)) / (n + 1))


def promised_rejection(n: int, alpha: float) -> float:
    """Return the expected share of InD images with p <= alpha if no scores tie: floor(alpha (n + 1)) / (n + 1).

    Example:
        >>> promised_rejection(n=160, alpha=0.05)
        0.049689440993788817
    """
    return rejected_rank(n, alpha) / (n + 1)


def rejected_rank(n: int, alpha: float) -> int:
    """Return the rank of the threshold among n calibration scores, counted from the largest: floor(alpha (n + 1)).

    Example:
        >>> rejected_rank(n=160, alpha=0.05)
        8
    """
    return int(np.floor(alpha * (n + 1) + 1e-9))


def needed_images(alpha: float) -> int:
    """Return the smallest number of calibration images that can guarantee alpha: ceil(1 / alpha) - 1.

    Example:
        >>> needed_images(0.05)
        19
    """
    return int(np.ceil(1 / alpha - 1e-9)) - 1


@dataclass(frozen=True)
class Conformal:
    """Decides on images from their scores and predicted classes, with a guaranteed false-rejection rate.

    A predicted class with at least ceil(1 / alpha) - 1 calibration images is compared with these alone (Mondrian
    conformal prediction: Vovk et al., 4.5), and the coverage guarantee holds for each such class. The other classes
    are pooled into one group, compared with the calibration images of that group alone: its guarantee is for the group,
    not for each class in it. (Compared with all calibration images, mostly of other classes, it would hold for
    neither.) If the group has too few images, the classes with the fewest images join it.

    The groups depend on the numbers of calibration images; the guarantee is exact for groups that are set beforehand.

    Attributes:
        alpha: the false-rejection rate, in (0, 1).
        by_class: sorted calibration scores of each predicted class with its own threshold.
        pooled: sorted calibration scores [n] of the other classes; of all images if there are no other classes.
    """

    alpha: float
    by_class: Mapping[int, Array]
    pooled: Array

    @classmethod
    def fit(cls, scores: ArrayLike, predicted: ArrayLike, alpha: float, conditional: bool = True) -> "Conformal":
        """Fit on InD calibration images.

        Args:
            scores: outlier scores [n].
            predicted: predicted labels [n], integers.
            alpha: the false-rejection rate, in (0, 1); rounded to 12 decimals, so that 1 - 0.9 is 0.1.
            conditional: give predicted classes with enough images their own thresholds; False: pool all.

        Raises:
            SettingError: n is too small to guarantee alpha.
            DataError: a score is NaN.

        Example:
            >>> fitted = Conformal.fit(range(30), [0] * 12 + [1] * 11 + [2] * 7, alpha=0.1)
            >>> fitted.thresholds, fitted.pooled_classes(3)
            ({0: 11.0}, [1, 2])
            >>> fitted.rejects([11.5, 11.5], [0, 1])
            array([ True, False])
        """
        alpha = round(alpha, 12)
        values, labels = numbers("calibration", scores), np.asarray(predicted, int)
        accept_threshold(values, 1 - alpha)
        values, labels = values[order := np.argsort(values)], labels[order]
        classes = _classes_with_enough(labels, needed_images(alpha)) if conditional else []
        others = values[~np.isin(labels, classes)]
        by_class = {label: values[labels == label] for label in classes}
        return cls(alpha, by_class, others if len(others) else values)

    def p_values(self, scores: ArrayLike, predicted: ArrayLike, rng: np.random.Generator | None = None) -> Array:
        """Return the p-values [B] of scores [B] under predicted labels [B]; see `conformal_p_values`."""
        values, labels = numbers("scores", scores), np.asarray(predicted, int)
        p = conformal_p_values(self.pooled, values, rng)
        for label, calibration in self.by_class.items():
            of_class = labels == label
            p[of_class] = conformal_p_values(calibration, values[of_class], rng)
        return p

    def threshold(self, predicted: int | None = None) -> float:
        """Return the threshold of a predicted label, above which a score is OOD; None: of the pooled classes."""
        calibration = self.pooled if predicted is None else self.by_class.get(predicted, self.pooled)
        return accept_threshold(calibration, 1 - self.alpha)

    def rejects(self, scores: ArrayLike, predicted: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each image is OOD: p <= alpha, or equally, a score above the threshold. Bool [B]."""
        values, labels = numbers("scores", scores), np.asarray(predicted, int)
        thresholds = np.full(len(values), self.threshold())
        for label, threshold in self.thresholds.items():
            thresholds[labels == label] = threshold
        return np.asarray(values > thresholds)

    @property
    def thresholds(self) -> dict[int, float]:
        """The thresholds of the predicted classes that have their own."""
        return {label: self.threshold(label) for label in self.by_class}

    def pooled_classes(self, num_classes: int) -> list[int]:
        """List the labels in 0..num_classes-1 that are pooled."""
        return [label for label in range(num_classes) if label not in self.by_class]

    def groups(self, predicted: ArrayLike) -> list[tuple[int, int]]:
        """Count the images with predicted labels [B] by group: (calibration images, these images), if there are any."""
        labels = np.asarray(predicted, int)
        classes = [(len(scores), int((labels == label).sum())) for label, scores in self.by_class.items()]
        pooled = (len(self.pooled), int((~np.isin(labels, list(self.by_class))).sum()))
        return [(n, m) for n, m in (*classes, pooled) if m]

    def promised(self, predicted: ArrayLike) -> float:
        """Return the expected rejection rate of InD images with these predicted labels [B], if no scores tie.

        For a group with n calibration images it is floor(alpha (n + 1)) / (n + 1).
        """
        sizes, counts = zip(*self.groups(predicted), strict=True)
        return float(np.average([promised_rejection(size, self.alpha) for size in sizes], weights=counts))


def _classes_with_enough(labels: NDArray[np.int_], needed: int) -> list[int]:
    """List the labels with enough calibration images, such that all others together have enough too, or none."""
    values, sizes = np.unique(labels, return_counts=True)
    counts = dict(zip(values.tolist(), sizes.tolist(), strict=True))
    classes = sorted((label for label in counts if counts[label] >= needed), key=lambda label: -counts[label])
    while classes and 0 < len(labels) - sum(counts[label] for label in classes) < needed:
        classes.pop()
    return sorted(classes)


def numbers(name: str, values: ArrayLike) -> Array:
    """Convert scores to float64 [n].

    Args:
        name: for the error message.

    Raises:
        DataError: a score is NaN, whose rank would be silently wrong.
    """
    scores = np.asarray(values, float).reshape(-1)
    if missing := int(np.isnan(scores).sum()):
        raise DataError(f"{name}: {missing} of {len(scores)} scores are not a number")
    return scores
