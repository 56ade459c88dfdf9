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
    """All candidate bands of a gate's scores, with each one's AUROC and share of images on given data.

    A band is an open interval between bins of the gate's scores. Images in it are ranked by the second detector, all
    others by the gate, below the band or above it. OOD images come in groups (near, far), so that a gain on one group
    does not hide a loss on another.

    Attributes:
        ends: [bands, 2], infinite on a side without a bound. The first band is empty.
        auroc: of the cascade against each group, ties counted half, [groups, bands].
        share_ind: share of the InD images in the band, [bands].
        share_ood: share of the OOD images of each group in the band, [groups, bands].
    """

    ends: Array
    auroc: Array
    share_ind: Array
    share_ood: Array

    @property
    def share(self) -> Array:
        """Share of images in the band, [bands], in a stream of half InD and half OOD, equal parts of each group."""
        return np.asarray((self.share_ind + self.share_ood.mean(axis=0)) / 2)

    @classmethod
    def of(cls, gate_ind: Array, gate_ood: Sequence[Array], second_ind: Array, second_ood: Sequence[Array]) -> "Bands":
        """Evaluate all bands on outlier scores of InD images [N] and of groups of OOD images [M] by both detectors.

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
        ind, *ood = (bin_[np.searchsorted(values, scores)] for scores in (gate_ind, *gate_ood))
        # Each band is the bins first..last - 1; the first band is empty.
        first, last = (np.concatenate([[0], indices]) for indices in np.triu_indices(count + 1, k=1))
        last[0] = 0
        auroc = []
        for group, gate, second in zip(ood, gate_ood, second_ood, strict=True):
            by_gate = _ordered_pairs(gate_ind, gate, ind, group, count)
            by_second = _ordered_pairs(second_ind, second, ind, group, count)
            gained = np.zeros((count + 1, count + 1))
            gained[1:, 1:] = (by_second - by_gate).cumsum(axis=0).cumsum(axis=1)
            inside = gained[last, last] - gained[first, last] - gained[last, first] + gained[first, first]
            auroc.append((by_gate.sum() + inside) / (len(ind) * len(group)))
        smallest = np.searchsorted(bin_, np.arange(count))
        low = np.concatenate([[-np.inf], values[smallest[1:] - 1], values[-1:]])
        high = np.concatenate([values[smallest], [np.inf]])
        ends = np.stack([low[first], high[last]], axis=1)
        ends[0] = values[0]
        up_to = (np.concatenate([[0.0], np.bincount(bins, minlength=count).cumsum()]) for bins in (ind, *ood))
        share_ind, *share_ood = ((counts[last] - counts[first]) / counts[-1] for counts in up_to)
        return cls(ends, np.stack(auroc), share_ind, np.stack(share_ood))

    def least(self, auroc: ArrayLike) -> tuple[float, float]:
        """Return the band with the smallest share that reaches these AUROCs [groups].

        Among bands of equal share it is the one with the highest mean AUROC. If no band reaches them, all images are in
        the band.
        """
        reaching = np.flatnonzero((self.auroc >= np.asarray(auroc)[:, None] - 1e-12).all(axis=0))
        if not len(reaching):
            return -np.inf, np.inf
        # Rounded, since equal shares are sums of different fractions and may differ in the last digit.
        best = reaching[np.lexsort([-self.auroc[:, reaching].mean(axis=0), self.share[reaching].round(12)])[0]]
        return float(self.ends[best, 0]), float(self.ends[best, 1])


def _bins(values: Array, gate_ind: Array, gate_ood: Sequence[Array]) -> Bins:
    """The bin of each distinct score, from 0 up: its own, or, if there are too many, of equal shares of the stream."""
    if len(values) <= MOST_BINS:
        return np.arange(len(values))
    ind, *ood = (
        np.searchsorted(np.sort(scores), values, side="right") / len(scores) for scores in (gate_ind, *gate_ood)
    )
    quantile = np.ceil((ind + np.mean(ood, axis=0)) / 2 * MOST_BINS - 1e-9)
    bins: Bins = np.unique(quantile, return_inverse=True)[1]
    return bins


def _ordered_pairs(scores_ind: Array, scores_ood: Array, ind: Bins, ood: Bins, count: int) -> Array:
    """Number of pairs in the right order, ties counted half, by the bins of the InD and of the OOD image."""
    pairs = np.zeros((count, count))
    for bin_ in np.unique(ind):
        in_bin = np.sort(scores_ind[ind == bin_])
        below = (np.searchsorted(in_bin, scores_ood, "left") + np.searchsorted(in_bin, scores_ood, "right")) / 2
        pairs[bin_] = np.bincount(ood, weights=below, minlength=count)
    return pairs
