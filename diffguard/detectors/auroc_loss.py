"""How much AUROC one detector loses to another on the same images, and how much it may lose on others."""

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv, ndtri

from diffguard.calibration.conformal import Array


@dataclass(frozen=True)
class Placements:
    """What each image adds to a detector's AUROC (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988).

    Attributes:
        ind: of each InD image the share of OOD images that score higher, ties counted half, [N] in [0, 1].
        ood: of each OOD image the share of InD images that score lower, [M] in [0, 1].
    """

    ind: Array
    ood: Array

    @classmethod
    def of(cls, ind: Array, ood: Array) -> "Placements":
        """From outlier scores of InD images [N] and OOD images [M].

        Example:
            >>> round(Placements.of(np.array([0.0, 2.0]), np.array([1.0, 3.0, 3.0])).auroc, 3)
            0.833
        """
        return cls(1 - _share_below(ood, ind), _share_below(ind, ood))

    @property
    def auroc(self) -> float:
        """The mean of either."""
        return float(self.ood.mean())


@dataclass(frozen=True)
class AurocLoss:
    """AUROC of a first detector minus that of a second, on the same images.

    Where the two agree on most images, the difference of placements is 0 on most, and varies much less than either.

    Attributes:
        ind: the first's placements of the InD images minus the second's, [N] in [-1, 1].
        ood: the same of the OOD images, [M].
    """

    ind: Array
    ood: Array

    @classmethod
    def of(cls, first: Placements, second: Placements) -> "AurocLoss":
        return cls(first.ind - second.ind, first.ood - second.ood)

    @property
    def value(self) -> float:
        """On these images."""
        return float(self.ood.mean())

    def upper(self, confidence: float, *, ind_unseen: bool, ood_unseen: bool, times: float = 1.0) -> float:
        """An upper confidence bound of the loss on new images.

        The variance is DeLong's. It says nothing of images on which the second detector fails and which are too rare
        to be among these, so an image that loses all that there is to lose is added to each kind that may have some.
        The quantile is that of a gamma distribution with the mean, the variance and twice the skewness of the
        estimate. If k images lose the same and the others nothing, that is the exact bound of a rare event's rate, the
        quantile of a gamma distribution of shape k + 1; if many lose a little each, it is the normal quantile.

        Args:
            confidence: in [0.5, 1).
            ind_unseen, ood_unseen: whether new InD, or OOD, images can lose that are like none of these.
            times: as if there were so many times as many images like these.
        """
        mean, variance, third = self.value, 0.0, 0.0
        for losses, unseen in ((self.ind, ind_unseen), (self.ood, ood_unseen)):
            weights = np.full(len(losses), times)
            if unseen:
                losses, weights = np.append(losses, 1.0), np.append(weights, 1.0)
            count = float(weights.sum())
            center = float(weights @ losses) / count
            mean += center - self.value
            variance += float(weights @ (losses - center) ** 2) / (count * max(count - 1, 1.0))
            third += float(weights @ (losses - center) ** 3) / count**3
        if variance <= 0:
            return mean
        return mean + float(np.sqrt(variance)) * _quantile(confidence, 2 * third / variance**1.5)


def _share_below(others: Array, scores: Array) -> Array:
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    return np.asarray(below / 2 / len(others))


def _quantile(confidence: float, skewness: float) -> float:
    """Of a gamma distribution of mean 0, variance 1 and this skewness; the normal one's where it is not positive."""
    if skewness < 1e-2:
        return float(ndtri(confidence))
    shape = 4 / skewness**2
    return float((gammaincinv(shape, confidence) - shape) / np.sqrt(shape))
