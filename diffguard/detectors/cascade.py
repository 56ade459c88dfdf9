"""Cascades: a cheap detector decides clear cases, an expensive one those in a band of the cheap one's scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffguard.calibration.conformal import Array, numbers
from diffguard.calibration.zscores import calibration_z_scores, z_scores
from diffguard.detectors.combination import Combined, Members, Sides
from diffguard.errors import SettingError
from diffguard.settings import Combination

MOST_BINS = 400
"""Into how many bins, at the most, the gate's scores are put; the ends of a band lie between bins."""

Bins = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(frozen=True)
class Cascade(Combined):
    """The first member, the gate, decides clear cases, and the second those between.

    Attributes:
        band: an image whose gate z-score lies between the two goes on to the second detector.
    """

    band: tuple[float, float]

    @classmethod
    def fit(cls, settings: Combination, calibration: Members, validation: Sides | None) -> Self:
        """Choose the band on validation.

        It is the one through which the least share of a stream goes on to the second detector, of those that lose,
        against each group of validation's OOD images, at most `loss` AUROC to the second alone. The stream is half
        InD, half OOD with an equal part of each group. Of equal bands it is that with the highest mean AUROC; if
        none is good enough, everything goes on.
        """
        gate, second = settings.of
        ind, groups = validation or ({}, {})
        parts = [ind, *groups.values()]
        if not groups or not all(len(part.get(gate, ())) for part in parts):
            raise SettingError(f"the cascade of {gate} and {second} needs InD and OOD images in the validation split")
        assert settings.loss is not None
        z_gate, z_second = (
            [z_scores(calibration[name], numbers(name, part[name])) for part in parts] for name in (gate, second)
        )
        second_alone = np.array([_auroc(ind[second], ood[second]) for ood in groups.values()])
        bands = Bands.of(z_gate[0], z_gate[1:], z_second[0], z_second[1:])
        return cls(settings, calibration, bands.least(second_alone - settings.loss))

    @property
    def always_needed(self) -> tuple[str, ...]:
        return self.members[:1]

    def needed(self, member: str, scores: Members) -> NDArray[np.bool_]:
        gate = self.members[0]
        return super().needed(member, scores) if member == gate else self.undecided(scores[gate])

    def undecided(self, gate_scores: ArrayLike) -> NDArray[np.bool_]:
        """Which images the gate, from its scores [B], leaves to the second detector. Bool [B]."""
        return self._in_band(z_scores(self.calibration[self.members[0]], gate_scores))

    def score(self, members: Members) -> Array:
        gate, second = self.members
        gate_scores, second_scores = self.member_scores(members)
        z_gate, z_second = z_scores(self.calibration[gate], numbers(gate, gate_scores)), np.zeros(len(second_scores))
        in_band = self._in_band(z_gate)
        z_second[in_band] = z_scores(self.calibration[second], numbers(second, second_scores[in_band]))
        return self._ranked(z_gate, z_second)

    def score_calibration(self) -> Array:
        """See `Combined.score_calibration`. The band is of validation, and no calibration image has a part in it."""
        z_gate, z_second = (calibration_z_scores(self.calibration[name]) for name in self.members)
        return self._ranked(z_gate, z_second)

    def fitted_values(self) -> dict[str, Any]:
        return {"band": [end if np.isfinite(end) else None for end in self.band]}

    @classmethod
    def restore(cls, settings: Combination, calibration: Members, values: Mapping[str, Any]) -> Self:
        low, high = values["band"]
        band = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
        return cls(settings, calibration, band)

    def _in_band(self, z_gate: Array) -> NDArray[np.bool_]:
        return np.asarray((z_gate > self.band[0]) & (z_gate < self.band[1]))

    def _ranked(self, z_gate: Array, z_second: Array) -> Array:
        """Scores: what the gate clears under what it leaves open, and that under what it rejects."""
        low, high = self.band
        # No image lies beyond an infinite end, so that any number can stand for it.
        if np.isinf(high):
            high = 1.0 if np.isinf(low) else low + 1
        if np.isinf(low):
            low = high - 1
        inside = low + (high - low) * (0.5 + np.arctan(z_second) / np.pi)
        return np.where(self._in_band(z_gate), inside, z_gate)


def _auroc(ind: Array, ood: Array) -> float:
    ordered = np.sort(ind)
    below = np.searchsorted(ordered, ood, "left") + np.searchsorted(ordered, ood, "right")
    return float(below.mean() / 2 / len(ind))


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
