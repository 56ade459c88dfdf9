"""The fusion of those of several rows that validation chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from diffguard.calibration.conformal import Array
from diffguard.calibration.zscores import z_scores
from diffguard.detectors.combination import Cost, Members, Sides, check_candidates, checked_sides
from diffguard.detectors.fusion import ZSum
from diffguard.metrics import Resampled, resample_scores
from diffguard.settings import Combination

DRAWS, SEED = 1000, 0
"""Of the bootstrap."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class Best(ZSum):
    """The sum of the z-scores of those candidates that were chosen. The others need not be scored.

    Attributes:
        chosen: of `Combination.of`, in that order.
        validation: what the choice is based on: "images": how many of "ind" and of each group of OOD images;
            "confidence": of the settings; "auroc": of the choice on validation, by group and their "mean";
            "runner_up": "members" and "auroc" of the fusion with the highest mean of all others that were tried, and
            "difference": the choice's mean minus its, with the interval of that confidence.
    """

    chosen: Names
    validation: Mapping[str, Any]

    @classmethod
    def fit(
        cls, settings: Combination, calibration: Members, validation: Sides | None, cost: Cost | None = None
    ) -> Self:
        """Choose the members on validation, by forward selection.

        What counts is the mean of the AUROC against each group of OOD images. It starts with the best candidate, and
        adds the one that raises it most as long as the paired bootstrap interval of the gain excludes zero. In both,
        those whose difference to the best has an interval that includes zero are as good, and of them the one with
        which the fusion needs the fewest network evaluations is taken, then the one with the highest mean.
        """
        parts = checked_sides(settings, validation)
        z = {
            part: {name: z_scores(calibration[name], scores[name]) for name in settings.of}
            for part, scores in parts.items()
        }
        tried = _Tried(z, settings, cost)
        chosen = tried.pick([(name,) for name in settings.of])
        while larger := [each for each in tried.with_one_more(chosen) if tried.gain(each, chosen)["low"] > 0]:
            chosen = tried.pick(larger)
        return cls(settings, _only(chosen, calibration), chosen, tried.evidence(chosen))

    @property
    def members(self) -> Names:
        return self.chosen

    def fitted_values(self) -> dict[str, Any]:
        return {"members": list(self.chosen), "validation": dict(self.validation)}

    @classmethod
    def restore(cls, settings: Combination, calibration: Members, values: Mapping[str, Any]) -> Self:
        chosen = tuple(values["members"])
        check_candidates(settings, chosen)
        return cls(settings, calibration, chosen, values["validation"])


class _Tried:
    """Fusions that were tried on validation, each by its members in the order of the settings.

    Args:
        z: by "ind" and each group of OOD images, the z-scores of each candidate.
    """

    def __init__(self, z: Mapping[str, Members], settings: Combination, cost: Cost | None) -> None:
        self._z, self._settings, self._cost = z, settings, cost
        self._resampled: dict[Names, Resampled] = {}

    def with_one_more(self, members: Names) -> list[Names]:
        """Fusions of these and one of the other candidates each."""
        of = self._settings.of
        return [tuple(n for n in of if n in (*members, name)) for name in of if name not in members]

    def gain(self, members: Names, others: Names) -> dict[str, float]:
        """Mean AUROC of a fusion minus that of another: "value", "low" and "high"."""
        confidence = self._settings.confidence
        difference = self._draws(members).difference(self._draws(others), ("auroc",), confidence)
        return difference["mean"]["auroc"]

    def pick(self, fusions: Sequence[Names]) -> Names:
        """Of those that are as good as the best, the cheapest; then that of the fewest members, then the best."""
        best = max(fusions, key=self._mean)
        as_good = [each for each in fusions if each == best or self.gain(best, each)["low"] <= 0]
        return min(as_good, key=lambda each: (self._evaluations(each), len(each), -self._mean(each)))

    def evidence(self, chosen: Names) -> dict[str, Any]:
        """See `Best.validation`."""
        runner_up = max((each for each in self._resampled if each != chosen), key=self._mean)
        return {
            "images": {part: len(next(iter(scores.values()))) for part, scores in self._z.items()},
            "confidence": self._settings.confidence,
            "auroc": self._auroc(chosen),
            "runner_up": {
                "members": list(runner_up),
                "auroc": self._auroc(runner_up),
                "difference": self.gain(chosen, runner_up),
            },
        }

    def _auroc(self, members: Names) -> dict[str, float]:
        return {group: float(metrics["auroc"][0, 0]) for group, metrics in self._draws(members).by_seed.items()}

    def _mean(self, members: Names) -> float:
        return self._auroc(members)["mean"]

    def _evaluations(self, members: Names) -> float:
        # Rounded, since equal costs are sums of different fractions and may differ in the last digit.
        return 0.0 if self._cost is None else round(self._cost(members), 9)

    def _draws(self, members: Names) -> Resampled:
        if members not in self._resampled:
            fused: dict[str, Array] = {
                part: np.sum([scores[name] for name in members], axis=0) for part, scores in self._z.items()
            }
            ind = fused.pop("ind")
            self._resampled[members] = resample_scores(
                [ind],
                {group: [scores] for group, scores in fused.items()},
                {"mean": list(fused)},
                draws=DRAWS,
                seed=SEED,
                metrics=("auroc",),
            )
        return self._resampled[members]


def _only(names: Names, scores: Members) -> dict[str, Array]:
    return {name: scores[name] for name in names}
