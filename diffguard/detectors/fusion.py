"""Fusions: the calibrated scores of several detectors as one."""

from abc import abstractmethod
from typing import Self

import numpy as np

from diffguard.calibration.conformal import Array
from diffguard.calibration.zscores import calibration_log_p_values, log_p_values, upper_quantiles
from diffguard.detectors.combination import Combined, Cost, Members, Sides
from diffguard.settings import Combination


class Fusion(Combined):
    """A function of the members' conformal p-values."""

    @classmethod
    def fit(
        cls, settings: Combination, calibration: Members, validation: Sides | None, cost: Cost | None = None
    ) -> Self:
        return cls(settings, calibration)

    def score(self, members: Members) -> Array:
        log_p = [
            log_p_values(self.calibration[name], scores)
            for name, scores in zip(self.members, self.checked_scores(members), strict=True)
        ]
        return self.fuse(np.stack(log_p))

    def score_calibration(self) -> Array:
        return self.fuse(np.stack([calibration_log_p_values(self.calibration[name]) for name in self.members]))

    @abstractmethod
    def fuse(self, log_p: Array) -> Array:
        """One score [B] of the members' log p [members, B]."""


class ZSum(Fusion):
    """The sum of the z-scores."""

    def fuse(self, log_p: Array) -> Array:
        return np.asarray(upper_quantiles(log_p).sum(axis=0))


class Fisher(Fusion):
    """Fisher's sum of -2 log p."""

    def fuse(self, log_p: Array) -> Array:
        return np.asarray(-2 * log_p.sum(axis=0))


class Maximum(Fusion):
    """The largest z-score."""

    def fuse(self, log_p: Array) -> Array:
        z = upper_quantiles(log_p)
        # Ranks make many maxima equal: the sum decides between those.
        return np.asarray(z.max(axis=0) + 1e-6 * z.sum(axis=0))
