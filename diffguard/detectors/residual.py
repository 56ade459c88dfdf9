"""What is left of a detector's scores when those of a control are regressed out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from diffguard.calibration.conformal import Array
from diffguard.detectors.combination import Combined, Cost, Members, Sides
from diffguard.errors import DataError
from diffguard.settings import Combination


@dataclass(frozen=True)
class Residual(Combined):
    """The first member's scores without what the second explains of them on InD calibration images.

    Attributes:
        line: intercept and slope of the first's scores over the second's.
    """

    line: tuple[float, float]

    @classmethod
    def fit(
        cls, settings: Combination, calibration: Members, validation: Sides | None, cost: Cost | None = None
    ) -> Self:
        first, second = settings.of
        return cls(settings, calibration, _line(calibration[second], calibration[first]))

    def score(self, members: Members) -> Array:
        first, second = self.checked_scores(members)
        intercept, slope = self.line
        return np.asarray(first - (intercept + slope * second))

    def score_calibration(self) -> Array:
        first, second = self.members
        return _residuals_left_out(self.calibration[second], self.calibration[first])

    def fitted_values(self) -> dict[str, Any]:
        return {"line": list(self.line)}

    @classmethod
    def restore(cls, settings: Combination, calibration: Members, values: Mapping[str, Any]) -> Self:
        intercept, slope = values["line"]
        return cls(settings, calibration, (float(intercept), float(slope)))


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Intercept and slope of least squares; slope 0 where x does not vary."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 0.0
    return float(y.mean() - slope * x.mean()), slope


def _residuals_left_out(x: Array, y: Array) -> Array:
    """The residual of each image from the line of the n - 1 others."""
    n = len(x)
    if n < 2:
        raise DataError(f"calibration: leave-one-out needs at least 2 scores, there are {n}")
    dx, dy = x - x.mean(), y - y.mean()
    spread, together = (dx**2).sum() - n / (n - 1) * dx**2, (dx * dy).sum() - n / (n - 1) * dx * dy
    # What is left of one x that alone differs is rounding.
    varies = spread > 1e-12 * max(float((dx**2).sum()), 1e-300)
    slope = np.divide(together, spread, out=np.zeros(n), where=varies)
    # Both means move by -d / (n - 1) when an image is left out.
    return np.asarray(n / (n - 1) * (dy - slope * dx))
