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

    def needed(self, member: str, scores: Members, images: int) -> NDArray[np.bool_]:
        gate = self.members[0]
        return super().needed(member, scores, images) if member == gate else self.undecided(scores[gate])

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
