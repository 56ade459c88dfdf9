"""Several detectors as one: fusion of calibrated scores, regression on a control, and cascades.

Nothing here is fitted on OOD images but the band of a cascade, on validation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffguard.calibration.conformal import Array, numbers
from diffguard.calibration.zscores import calibration_log_p_values, log_p_values, upper_quantiles, z_scores
from diffguard.detectors.cascade import Bands
from diffguard.errors import DataError, SettingError
from diffguard.settings import Combination

Members = Mapping[str, Array]
"""Outlier scores [N] of the same images, by the name of the row that they are of."""

Sides = tuple[Members, Mapping[str, Members]]
"""Scores of the InD images of a split, and of its OOD images by their group (near, far)."""


@dataclass(frozen=True)
class Combined:
    """A combination, fitted on InD calibration images.

    Attributes:
        calibration: by the name of the member row, its scores of the calibration images [n].
        band: of a cascade: an image whose gate z-score lies between the two goes on to the second detector.
        line: of a residual: intercept and slope of the first's scores over the second's.

    Example:
        >>> calibration = {"a": np.arange(99.0), "b": np.arange(99.0)}
        >>> fused = fit_combination(Combination(kind="z-sum", of=("a", "b")), calibration)
        >>> fused.score({"a": np.array([49.0, 98.0]), "b": np.array([49.0, 40.0])}).round(2)
        array([0. , 2.1])
    """

    settings: Combination
    calibration: Members
    band: tuple[float, float] | None = None
    line: tuple[float, float] | None = None

    def score(self, members: Members) -> Array:
        """Outlier scores [B], higher = more OOD.

        Args:
            members: by the name of each member row, its scores [B]. Of a cascade's second they may be NaN
                where the gate has decided.

        Raises:
            DataError: a member or one of its scores is missing.
        """
        of = {name: np.asarray(members[name], float) for name in self._present(members)}
        first, second = self.settings.of[:2]
        if self.settings.kind == "residual":
            return self._residual(numbers(first, of[first]), numbers(second, of[second]))
        if self.settings.kind == "cascade":
            gate, there = z_scores(self.calibration[first], numbers(first, of[first])), np.zeros(len(of[second]))
            open_ = self._between(gate)
            there[open_] = z_scores(self.calibration[second], numbers(second, of[second][open_]))
            return self._ranked(gate, there)
        each = [log_p_values(self.calibration[name], numbers(name, of[name])) for name in self.settings.of]
        return self._fused(np.stack(each))

    def score_calibration(self) -> Array:
        """The scores of the calibration images themselves [n], each fitted on the n - 1 others.

        Only so are they what a new InD image's score is compared with. The band of a cascade is no one's.
        """
        first, second = self.settings.of[:2]
        if self.settings.kind == "residual":
            return _residuals_left_out(self.calibration[second], self.calibration[first])
        each = np.stack([calibration_log_p_values(self.calibration[name]) for name in self.settings.of])
        if self.settings.kind == "cascade":
            gate, there = upper_quantiles(each)
            return self._ranked(gate, there)
        return self._fused(each)

    def undecided(self, gate_scores: ArrayLike) -> NDArray[np.bool_]:
        """Which images a cascade's gate, from its scores [B], leaves to the second detector. Bool [B]."""
        return self._between(z_scores(self.calibration[self.settings.of[0]], gate_scores))

    def to_json(self) -> dict[str, Any]:
        """What was fitted, as plain values, but for the calibration scores; an infinite end of a band is None."""
        band = None if self.band is None else [each if np.isfinite(each) else None for each in self.band]
        line = None if self.line is None else list(self.line)
        return {"settings": self.settings.model_dump(mode="json"), "band": band, "line": line}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], calibration: Members) -> "Combined":
        """From `to_json` and the member rows' scores of the calibration images."""
        settings = Combination.model_validate(values["settings"])
        kept = {name: numbers(name, calibration[name]) for name in settings.of}
        band = line = None
        if values.get("band") is not None:
            low, high = values["band"]
            band = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
        if values.get("line") is not None:
            intercept, slope = values["line"]
            line = (float(intercept), float(slope))
        return cls(settings, kept, band, line)

    def _present(self, members: Members) -> tuple[str, ...]:
        if lacking := [name for name in self.settings.of if name not in members]:
            raise DataError(f"{self.settings.kind}: scores of {lacking[0]} are missing")
        return self.settings.of

    def _residual(self, first: Array, second: Array) -> Array:
        assert self.line is not None
        return np.asarray(first - (self.line[0] + self.line[1] * second))

    def _fused(self, log_p: Array) -> Array:
        """One score [B] of the members' log p [members, B]."""
        if self.settings.kind == "fisher":
            return np.asarray(-2 * log_p.sum(axis=0))
        z = upper_quantiles(log_p)
        total = z.sum(axis=0)
        # Ranks make many maxima equal: the sum decides between those.
        return np.asarray(total if self.settings.kind == "z-sum" else z.max(axis=0) + 1e-6 * total)

    def _between(self, gate: Array) -> NDArray[np.bool_]:
        assert self.band is not None
        return np.asarray((gate > self.band[0]) & (gate < self.band[1]))

    def _ranked(self, gate: Array, second: Array) -> Array:
        """A cascade's scores: what the gate clears under what it leaves open, and that under what it rejects."""
        assert self.band is not None
        low, high = self.band
        # No image lies beyond an infinite end, so that any number can stand for it.
        if np.isinf(high):
            high = 1.0 if np.isinf(low) else low + 1
        if np.isinf(low):
            low = high - 1
        inside = low + (high - low) * (0.5 + np.arctan(second) / np.pi)
        return np.where(self._between(gate), inside, gate)


def fit_combination(settings: Combination, calibration: Members, validation: Sides | None = None) -> Combined:
    """Fit a combination.

    The band of a cascade is the one through which the least share of a stream goes on to the second detector, of
    those that lose, against each group of validation's OOD images, at most `loss` AUROC to the second alone. The
    stream is half InD, half OOD with an equal part of each group. Of equal bands it is that with the highest mean
    AUROC; if none is good enough, everything goes on.

    Args:
        calibration: by the name of each member row, its scores of InD calibration images [n].
        validation: of a cascade, the same of the validation split's InD images, and of its OOD images by group.

    Raises:
        SettingError: a cascade has no validation images of both kinds, or a group has none.
        DataError: a member or one of its scores is missing.
    """
    if lacking := [name for name in settings.of if name not in calibration]:
        raise DataError(f"{settings.kind}: calibration scores of {lacking[0]} are missing")
    kept = {name: numbers(name, calibration[name]) for name in settings.of}
    first, second = settings.of[:2]
    if settings.kind == "residual":
        return Combined(settings, kept, line=_line(kept[second], kept[first]))
    if settings.kind != "cascade":
        return Combined(settings, kept)
    ind, groups = validation or ({}, {})
    parts = [ind, *groups.values()]
    if not groups or not all(len(part.get(first, ())) for part in parts):
        raise SettingError(f"the cascade of {first} and {second} needs InD and OOD images in the validation split")
    assert settings.loss is not None
    gate, there = ([z_scores(kept[name], numbers(name, part[name])) for part in parts] for name in (first, second))
    alone = np.array([_auroc(ind[second], ood[second]) for ood in groups.values()])
    bands = Bands.of(gate[0], gate[1:], there[0], there[1:])
    return Combined(settings, kept, band=bands.least(alone - settings.loss))


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


def _auroc(ind: Array, ood: Array) -> float:
    ordered = np.sort(ind)
    below = np.searchsorted(ordered, ood, "left") + np.searchsorted(ordered, ood, "right")
    return float(below.mean() / 2 / len(ind))
