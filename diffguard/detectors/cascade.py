"""Which band of a cheap detector's scores goes on to an expensive one: what each band costs, and what it loses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffguard.calibration.conformal import Array

MOST_BINS = 400
"""Into how many bins, at the most, the gate's scores are put; the ends of a band lie between bins."""

Bins = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(frozen=True)
class Bands:
    """Every band of a gate's scores between bins of them, and what its cascade does to given images.

    Of the images in a band, an open interval, the second detector decides their order; all others keep the
    gate's. They rank under the band or over it. OOD images come in groups (near, far), so that what a cascade
    gains on one of them does not hide what it loses on another.

    Attributes:
        ends: [bands, 2]; infinite where nothing is left out on that side. The first band is empty.
        auroc: of the cascade against each group, ties counted half. [groups, bands].
        share_ind: of InD images, those in the band. [bands].
        share_ood: the same of the OOD images of each group. [groups, bands].
    """

    ends: Array
    auroc: Array
    share_ind: Array
    share_ood: Array

    @property
    def share(self) -> Array:
        """Of a stream, half InD, half OOD with an equal part of each group, the images in the band. [bands]."""
        return np.asarray((self.share_ind + self.share_ood.mean(axis=0)) / 2)

    @classmethod
    def of(cls, gate_ind: Array, gate_ood: Sequence[Array], second_ind: Array, second_ood: Sequence[Array]) -> "Bands":
        """From the outlier scores of InD images [N] and of each group of OOD images [M] by both detectors.

        Example:
            >>> zero, one = np.zeros(2), np.ones(2)
            >>> bands = Bands.of(gate_ind=zero, gate_ood=[zero, one], second_ind=zero, second_ood=[one, zero])
            >>> bands.ends.tolist()
            [[0.0, 0.0], [-inf, 1.0], [-inf, inf], [0.0, inf]]
            >>> bands.auroc.tolist(), bands.share.tolist()
            ([[0.5, 1.0, 1.0, 0.5], [1.0, 1.0, 0.5, 1.0]], [0.0, 0.75, 1.0, 0.25])
        """
        values = np.unique(np.concatenate([gate_ind, *gate_ood]))
        bin_ = _bins(values, gate_ind, gate_ood)
        count = int(bin_[-1]) + 1
        ind, *ood = (bin_[np.searchsorted(values, each)] for each in (gate_ind, *gate_ood))
        # A band of the bins first..last - 1; and the empty one.
        first, last = (np.concatenate([[0], each]) for each in np.triu_indices(count + 1, k=1))
        last[0] = 0
        auroc = []
        for mine, gate, second in zip(ood, gate_ood, second_ood, strict=True):
            by_gate = _ordered_pairs(gate_ind, gate, ind, mine, count)
            by_second = _ordered_pairs(second_ind, second, ind, mine, count)
            gained = np.zeros((count + 1, count + 1))
            gained[1:, 1:] = (by_second - by_gate).cumsum(axis=0).cumsum(axis=1)
            inside = gained[last, last] - gained[first, last] - gained[last, first] + gained[first, first]
            auroc.append((by_gate.sum() + inside) / (len(ind) * len(mine)))
        smallest = np.searchsorted(bin_, np.arange(count))
        low = np.concatenate([[-np.inf], values[smallest[1:] - 1], values[-1:]])
        high = np.concatenate([values[smallest], [np.inf]])
        ends = np.stack([low[first], high[last]], axis=1)
        ends[0] = values[0]
        upto = (np.concatenate([[0.0], np.bincount(each, minlength=count).cumsum()]) for each in (ind, *ood))
        share_ind, *share_ood = ((each[last] - each[first]) / each[-1] for each in upto)
        return cls(ends, np.stack(auroc), share_ind, np.stack(share_ood))

    def least(self, auroc: ArrayLike) -> tuple[float, float]:
        """The band of the least share that has these AUROC [groups], of equal ones that with the highest mean.

        If none has them, the band that holds everything.
        """
        fine = np.flatnonzero((self.auroc >= np.asarray(auroc)[:, None] - 1e-12).all(axis=0))
        if not len(fine):
            return -np.inf, np.inf
        # Equal shares are sums of other fractions and differ in the last digit.
        best = fine[np.lexsort([-self.auroc[:, fine].mean(axis=0), self.share[fine].round(12)])[0]]
        return float(self.ends[best, 0]), float(self.ends[best, 1])


def _bins(values: Array, gate_ind: Array, gate_ood: Sequence[Array]) -> Bins:
    """The bin of each different score, from 0 up: its own, or one of equal parts of the stream."""
    if len(values) <= MOST_BINS:
        return np.arange(len(values))
    ind, *ood = (np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (gate_ind, *gate_ood))
    part = np.ceil((ind + np.mean(ood, axis=0)) / 2 * MOST_BINS - 1e-9)
    found: Bins = np.unique(part, return_inverse=True)[1]
    return found


def _ordered_pairs(scores_ind: Array, scores_ood: Array, ind: Bins, ood: Bins, count: int) -> Array:
    """By the bin of the InD and of the OOD image: the pairs in the right order, ties counted half."""
    pairs = np.zeros((count, count))
    for bin_ in np.unique(ind):
        mine = np.sort(scores_ind[ind == bin_])
        below = (np.searchsorted(mine, scores_ood, "left") + np.searchsorted(mine, scores_ood, "right")) / 2
        pairs[bin_] = np.bincount(ood, weights=below, minlength=count)
    return pairs
