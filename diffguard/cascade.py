"""Which band of a cheap detector's scores goes on to an expensive one: what each band costs, and what it loses."""

from dataclasses import dataclass

import numpy as np

from diffguard.calibration import Array

MOST_GROUPS = 400
"""Into how many groups, at the most, the gate's scores are put; the ends of a band lie between groups."""


@dataclass(frozen=True)
class Bands:
    """Every band of a gate's scores between groups of them, and what its cascade does to given images.

    Of the images in a band, an open interval, the second detector decides their order; all others keep the
    gate's. They rank under the band or over it.

    Attributes:
        ends: [bands, 2]; infinite where nothing is left out on that side. The first band is empty.
        auroc: of the cascade, ties counted half. [bands].
        share_ind, share_ood: of InD and of OOD images, those in the band. [bands].
    """

    ends: Array
    auroc: Array
    share_ind: Array
    share_ood: Array

    @property
    def share(self) -> Array:
        """Of a stream of half InD, half OOD images, those in the band. [bands]."""
        return (self.share_ind + self.share_ood) / 2

    @classmethod
    def of(cls, gate_ind: Array, gate_ood: Array, second_ind: Array, second_ood: Array) -> "Bands":
        """From the outlier scores of InD images [N] and OOD images [M] by both detectors.

        Example:
            >>> zero, one = np.zeros(2), np.ones(2)
            >>> bands = Bands.of(gate_ind=zero, gate_ood=zero, second_ind=zero, second_ood=one)
            >>> bands.auroc, bands.share
            (array([0.5, 1. ]), array([0., 1.]))
        """
        values = np.unique(np.concatenate([gate_ind, gate_ood]))
        group = _groups(values, gate_ind, gate_ood)
        count = int(group[-1]) + 1
        ind, ood = (group[np.searchsorted(values, each)] for each in (gate_ind, gate_ood))
        by_gate = _ordered_pairs(gate_ind, gate_ood, ind, ood, count)
        by_second = _ordered_pairs(second_ind, second_ood, ind, ood, count)
        gained = np.zeros((count + 1, count + 1))
        gained[1:, 1:] = (by_second - by_gate).cumsum(axis=0).cumsum(axis=1)
        # A band of the groups first..last - 1; and the empty one.
        first, last = (np.concatenate([[0], each]) for each in np.triu_indices(count + 1, k=1))
        last[0] = 0
        inside = gained[last, last] - gained[first, last] - gained[last, first] + gained[first, first]
        smallest = np.searchsorted(group, np.arange(count))
        low = np.concatenate([[-np.inf], values[smallest[1:] - 1], values[-1:]])
        high = np.concatenate([values[smallest], [np.inf]])
        ends = np.stack([low[first], high[last]], axis=1)
        ends[0] = values[0]
        upto = (np.concatenate([[0.0], np.bincount(each, minlength=count).cumsum()]) for each in (ind, ood))
        shares = [(each[last] - each[first]) / each[-1] for each in upto]
        return cls(ends, (by_gate.sum() + inside) / (len(ind) * len(ood)), *shares)

    def least(self, auroc: float) -> tuple[float, float]:
        """The band of the least share that has this AUROC, of equal ones that with the highest.

        If none has it, the band that holds everything.
        """
        fine = np.flatnonzero(self.auroc >= auroc - 1e-12)
        if not len(fine):
            return -np.inf, np.inf
        best = fine[np.lexsort([-self.auroc[fine], self.share[fine]])[0]]
        return float(self.ends[best, 0]), float(self.ends[best, 1])


def _groups(values: Array, gate_ind: Array, gate_ood: Array) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """The group of each different score, from 0 up: its own, or one of equal parts of the stream."""
    if len(values) <= MOST_GROUPS:
        return np.arange(len(values))
    upto = [np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (gate_ind, gate_ood)]
    part = np.ceil(sum(upto) / 2 * MOST_GROUPS - 1e-9)
    found: np.ndarray[tuple[int], np.dtype[np.intp]] = np.unique(part, return_inverse=True)[1]
    return found


def _ordered_pairs(
    scores_ind: Array,
    scores_ood: Array,
    ind: np.ndarray[tuple[int], np.dtype[np.intp]],
    ood: np.ndarray[tuple[int], np.dtype[np.intp]],
    count: int,
) -> Array:
    """By the group of the InD and of the OOD image: the pairs in the right order, ties counted half."""
    pairs = np.zeros((count, count))
    for group in np.unique(ind):
        mine = np.sort(scores_ind[ind == group])
        below = (np.searchsorted(mine, scores_ood, "left") + np.searchsorted(mine, scores_ood, "right")) / 2
        pairs[group] = np.bincount(ood, weights=below, minlength=count)
    return pairs
