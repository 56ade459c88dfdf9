"""From InD calibration scores to p-values and the threshold of a decision, with a finite-sample promise.

Split conformal prediction (arXiv 2107.07511) of outlier scores (arXiv 2104.08279): if a new InD image and
the n calibration images are exchangeable, its p-value is at most alpha with probability at most alpha,
exactly floor(alpha (n + 1)) / (n + 1) where no scores tie. That is over draws of the calibration images
too: given one calibration set, the rate is beta-distributed around it. Of a variant whose stop is set on
calibration images (`stop.median_at`) these have helped to make the detector: its promise is near, not exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffguard.errors import DataError, SettingError

Array = NDArray[np.float64]


def accept_threshold(calibration: ArrayLike, accept: float) -> float:
    """The smallest threshold that accepts at least a share of InD images; a score above it is OOD.

    It is the ceil(accept * (n + 1))-th smallest of n calibration scores, so that a new InD image is
    accepted with probability at least `accept` (split conformal prediction, arXiv 2107.07511).

    Args:
        calibration: InD outlier scores [n], from images that trained nothing.
        accept: share of InD to accept, in (0, 1).

    Raises:
        SettingError: n is too small to promise that share.
        DataError: a score is not a number.

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
    """How usual scores are among InD: small p-values are OOD.

    p = (1 + #{c >= s}) / (n + 1): a tie counts against the image's being unusual, so that p stays valid,
    if conservative. With a generator ties are broken at random, p = (#{c > s} + U (1 + #{c = s})) / (n + 1),
    which is exactly uniform for InD images (Vovk et al., Algorithmic Learning in a Random World, 2.2; Bates et
    al., arXiv 2104.08279).

    Args:
        calibration: InD outlier scores [n].
        scores: outlier scores [B].
        rng: of the random ties, one uniform number for each score.

    Returns:
        [B], in (0, 1].

    Raises:
        DataError: a score is not a number.

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
    """The share of new InD images with p <= alpha where no scores tie: floor(alpha (n + 1)) / (n + 1).

    Example:
        >>> promised_rejection(n=160, alpha=0.05)
        0.049689440993788817
    """
    return rejected_rank(n, alpha) / (n + 1)


def rejected_rank(n: int, alpha: float) -> int:
    """Above which of n calibration scores, counted from the largest, an image is OOD: floor(alpha (n + 1)).

    Example:
        >>> rejected_rank(n=160, alpha=0.05)
        8
    """
    return int(np.floor(alpha * (n + 1) + 1e-9))


def needed_images(alpha: float) -> int:
    """The fewest calibration images that can promise alpha: ceil(1 / alpha) - 1.

    Example:
        >>> needed_images(0.05)
        19
    """
    return int(np.ceil(1 / alpha - 1e-9)) - 1


@dataclass(frozen=True)
class Conformal:
    """The decision on an image from its score and its predicted class, at a promised InD rejection rate.

    A predicted class with at least ceil(1 / alpha) - 1 calibration images is judged among them alone
    (Mondrian conformal prediction: Vovk et al., 4.5), and the promise holds for each such class. The other
    classes are one group, judged among the calibration images of that group alone: that promise is of the
    group, not of a class in it. (Among all calibration images, which are mostly of other classes, it would
    hold for neither.) Where the group has too few, the classes with the fewest images join it.

    Groups are found from the numbers of calibration images; the promise is exact for groups set beforehand.

    Attributes:
        alpha: the promised rate, in (0, 1).
        by_class: calibration scores of each predicted class that is judged by itself, sorted.
        pooled: those of the other classes [n], sorted; of all, where no image is of another class.
    """

    alpha: float
    by_class: Mapping[int, Array]
    pooled: Array

    @classmethod
    def fit(cls, scores: ArrayLike, predicted: ArrayLike, alpha: float, conditional: bool = True) -> "Conformal":
        """From InD calibration images.

        Args:
            scores: outlier scores [n].
            predicted: predicted labels [n], integers.
            alpha: the rate to promise; rounded to 12 decimals, so that 1 - 0.9 is 0.1.
            conditional: judge by predicted class where there are enough images; if not, never.

        Raises:
            SettingError: n is too small to promise alpha.
            DataError: a score is not a number.

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
        own = _judged_alone(labels, needed_images(alpha)) if conditional else []
        others = values[~np.isin(labels, own)]
        by_class = {label: values[labels == label] for label in own}
        return cls(alpha, by_class, others if len(others) else values)

    def p_values(self, scores: ArrayLike, predicted: ArrayLike, rng: np.random.Generator | None = None) -> Array:
        """Conformal p-values [B] of scores [B] under predicted labels [B]; see `conformal_p_values`."""
        values, labels = numbers("scores", scores), np.asarray(predicted, int)
        found = conformal_p_values(self.pooled, values, rng)
        for label, calibration in self.by_class.items():
            mine = labels == label
            found[mine] = conformal_p_values(calibration, values[mine], rng)
        return found

    def threshold(self, predicted: int | None = None) -> float:
        """What a score must exceed to be OOD under a predicted label; None: one of the classes that are pooled."""
        calibration = self.pooled if predicted is None else self.by_class.get(predicted, self.pooled)
        return accept_threshold(calibration, 1 - self.alpha)

    def rejects(self, scores: ArrayLike, predicted: ArrayLike) -> NDArray[np.bool_]:
        """Whether each is OOD: p <= alpha, which is the same as a score above the threshold. Bool [B]."""
        values, labels = numbers("scores", scores), np.asarray(predicted, int)
        limits = np.full(len(values), self.threshold())
        for label, limit in self.thresholds.items():
            limits[labels == label] = limit
        return np.asarray(values > limits)

    @property
    def thresholds(self) -> dict[int, float]:
        """The threshold of each predicted class that has its own."""
        return {label: self.threshold(label) for label in self.by_class}

    def pooled_classes(self, num_classes: int) -> list[int]:
        """The labels, of 0..num_classes - 1, that are judged as one group."""
        return [label for label in range(num_classes) if label not in self.by_class]

    def groups(self, predicted: ArrayLike) -> list[tuple[int, int]]:
        """Of predicted labels [B], those judged among the same calibration images: (how many of these, of those)."""
        labels = np.asarray(predicted, int)
        own = [(len(scores), int((labels == label).sum())) for label, scores in self.by_class.items()]
        pooled = (len(self.pooled), int((~np.isin(labels, list(self.by_class))).sum()))
        return [(n, m) for n, m in (*own, pooled) if m]

    def promised(self, predicted: ArrayLike) -> float:
        """The InD rejection rate to expect of images with these predicted labels [B], where no scores tie.

        Of each group it is floor(alpha (n + 1)) / (n + 1) of the number n of its calibration images.
        """
        sizes, counts = zip(*self.groups(predicted), strict=True)
        return float(np.average([promised_rejection(size, self.alpha) for size in sizes], weights=counts))


def _judged_alone(labels: NDArray[np.int_], needed: int) -> list[int]:
    """The labels with enough calibration images, if all others together have enough too, or none."""
    counts = dict(zip(*(each.tolist() for each in np.unique(labels, return_counts=True)), strict=True))
    own = sorted((label for label in counts if counts[label] >= needed), key=lambda label: -counts[label])
    while own and 0 < len(labels) - sum(counts[label] for label in own) < needed:
        own.pop()
    return sorted(own)


def numbers(name: str, values: ArrayLike) -> Array:
    """As float64 [n].

    Raises:
        DataError: one is NaN; a rank of it would be a silent error.
    """
    found = np.asarray(values, float).reshape(-1)
    if missing := int(np.isnan(found).sum()):
        raise DataError(f"{name}: {missing} of {len(found)} scores are not a number")
    return found
