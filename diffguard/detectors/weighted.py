"""The weighted sum of several rows' z-scores, with weights that are fitted on validation."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from diffguard.calibration.conformal import Array
from diffguard.calibration.zscores import upper_quantiles, z_scores
from diffguard.detectors.combination import Cost, Members, Sides, check_candidates, checked_sides
from diffguard.detectors.fusion import Fusion
from diffguard.errors import DataError
from diffguard.metrics import detection_metrics
from diffguard.settings import Combination

RIDGE = 1e-2
"""Of the squared weights, beside the mean loss of an image: rows that separate validation keep finite weights."""

LEAST = 1e-3
"""Share of the largest weight under which a row is left out."""

FARTHEST = 40.0
"""Standard deviations that an image is away from InD, at most, while weights are fitted: an infinite score has none."""


@dataclass(frozen=True)
class Weighted(Fusion):
    """The weighted sum of the z-scores of those rows that get a weight. The others need not be scored.

    Attributes:
        weights: by the name of a row, more than 0; their mean is 1, so that equal ones are a z-sum.
        validation: what they are fitted on: "images": how many of "ind" and of each group of OOD images; "auroc":
            the fusion's there, by group and their "mean".
    """

    weights: Mapping[str, float]
    validation: Mapping[str, Any]

    @classmethod
    def fit(
        cls, settings: Combination, calibration: Members, validation: Sides | None, cost: Cost | None = None
    ) -> Self:
        """Fit the weights on validation, by a logistic regression of InD against OOD.

        InD images together weigh as much as OOD images, and each group of these as much as another. Weights are not
        negative: what is farther from InD by a row is never nearer by the fusion. Rows whose weight is 0 are left
        out; if all are, the weights are equal.
        """
        parts = checked_sides(settings, validation)
        z = {
            part: np.stack([z_scores(calibration[name], scores[name]) for name in settings.of])
            for part, scores in parts.items()
        }
        fitted = _logistic_regression(z)
        if not fitted.any():
            fitted = np.ones_like(fitted)
        used = fitted > LEAST * fitted.max()
        values = fitted[used] / fitted[used].mean()
        fused = {part: values @ scores[used] for part, scores in z.items()}
        ind = fused.pop("ind")
        aurocs = {part: detection_metrics(ind, scores)["auroc"] for part, scores in fused.items()}
        weights = dict(zip(compress(settings.of, used), values.tolist(), strict=True))
        evidence = {
            "images": {part: scores.shape[1] for part, scores in z.items()},
            "auroc": {**aurocs, "mean": float(np.mean(list(aurocs.values())))},
        }
        return cls(settings, {name: calibration[name] for name in weights}, weights, evidence)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def fuse(self, log_p: Array) -> Array:
        return np.asarray(np.array(list(self.weights.values())) @ upper_quantiles(log_p))

    def fitted_values(self) -> dict[str, Any]:
        return {"members": list(self.members), "weights": dict(self.weights), "validation": dict(self.validation)}

    @classmethod
    def restore(cls, settings: Combination, calibration: Members, values: Mapping[str, Any]) -> Self:
        weights = {str(name): float(weight) for name, weight in values["weights"].items()}
        check_candidates(settings, weights)
        if wrong := [name for name, weight in weights.items() if not 0 < weight < np.inf]:
            raise DataError(f"{settings.kind}: the weight of {wrong[0]} is {weights[wrong[0]]}, not more than 0")
        members = list(values["members"])
        if not members or sorted(weights) != sorted(members):
            raise DataError(f"{settings.kind}: its weights are not those of {', '.join(members) or 'any row'}")
        return cls(settings, calibration, {name: weights[name] for name in members}, values["validation"])


def _logistic_regression(z: Mapping[str, Array]) -> Array:
    """Weights [rows], none of them negative, of z-scores [rows, images] by "ind" and groups of OOD images."""
    groups = len(z) - 1
    scores = np.concatenate(list(z.values()), axis=1).clip(-FARTHEST, FARTHEST)
    sign = np.concatenate([np.full(each.shape[1], -1.0 if part == "ind" else 1.0) for part, each in z.items()])
    share = np.concatenate(
        [np.full(each.shape[1], (0.5 if part == "ind" else 0.5 / groups) / each.shape[1]) for part, each in z.items()]
    )

    def loss(parameters: Array) -> tuple[float, Array]:
        weights, intercept = parameters[:-1], parameters[-1]
        margin = sign * (weights @ scores + intercept)
        slope = -share * sign * expit(-margin)
        gradient = np.append(scores @ slope + 2 * RIDGE * weights, slope.sum())
        return float(share @ np.logaddexp(0, -margin) + RIDGE * weights @ weights), gradient

    rows = len(scores)
    bounds = [(0.0, None)] * rows + [(None, None)]
    return np.asarray(minimize(loss, np.append(np.ones(rows), 0.0), jac=True, bounds=bounds).x[:-1])
