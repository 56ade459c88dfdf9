"""Cascades: a cheap detector decides clear cases, an expensive one those in a band of the cheap one's scores."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffguard.calibration.conformal import Array, numbers
from diffguard.calibration.zscores import calibration_z_scores, z_scores
from diffguard.detectors.auroc_loss import AurocLoss, Placements
from diffguard.detectors.combination import Combined, Cost, Members, Sides, checked_sides
from diffguard.settings import Combination

Band = tuple[float, float]

EVERYTHING = (-np.inf, np.inf)
"""The band through which every image goes on to the second detector."""

SEQUENCES = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
"""Of the share that does not go on, the parts that are cleared (under the band) and rejected (over it)."""

STEPS = 50
"""In how many equal steps a sequence of bands goes from everything to nothing."""

MOST_TIMES = 1e5
"""More than so many times the images are not said to be enough."""


@dataclass(frozen=True)
class Cascade(Combined):
    """The first member, the gate, decides clear cases, and the second those between.

    Attributes:
        band: an image whose gate z-score lies between the two goes on to the second detector.
        validation: what its choice is based on; empty if it was not chosen by `fit`. "images": how many of "ind" and
            of each group of OOD images; "stated_loss" and "confidence": of the settings; "share": of a stream that
            goes on; "loss": by group the AUROC that is lost on validation ("value") and its upper confidence bound
            ("upper"); "images_needed": None, or, if everything goes on, about how many images it takes to leave any
            to the gate (None again if no number is known to be enough).
    """

    band: Band
    validation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, settings: Combination, calibration: Members, validation: Sides | None, cost: Cost | None = None
    ) -> Self:
        """Choose the band on validation.

        It is the one through which the least share of a stream goes on to the second detector, of those that are
        shown to lose at most `loss` AUROC to the second alone, against each group of OOD images. The stream is half
        InD, half OOD with an equal part of each group.

        Of many bands, the best on validation loses more on new images. So bands are tested in `SEQUENCES`, from the
        widest on, each by an upper confidence bound of its loss (`AurocLoss.upper`), and a sequence ends with the
        first that fails (fixed-sequence testing, as in Learn then Test, arXiv 2110.01052). The confidence is of all
        sequences together (Bonferroni). If no band passes, everything goes on.
        """
        assert settings.loss is not None
        images = _Validation.of(settings, calibration, checked_sides(settings, validation))
        level = 1 - (1 - settings.confidence) / len(SEQUENCES)
        passed, failed = [], []
        for sequence in SEQUENCES:
            for band in images.bands(*sequence):
                trial = images.trial(cls(settings, calibration, band))
                if not trial.passes(settings.loss, level):
                    failed.append(trial)
                    break
                passed.append(trial)
        everything = images.trial(cls(settings, calibration, EVERYTHING))
        # Rounded, since equal shares are sums of different fractions and may differ in the last digit.
        chosen = min(passed, key=lambda trial: (round(trial.share, 12), trial.mean_loss), default=everything)
        upper = chosen.upper(level)
        evidence = {
            "images": images.counts,
            "stated_loss": settings.loss,
            "confidence": settings.confidence,
            "share": chosen.share,
            "loss": {group: {"value": loss.value, "upper": upper[group]} for group, loss in chosen.losses.items()},
            "images_needed": None if passed else images.needed(failed, settings.loss, level),
        }
        return cls(settings, calibration, chosen.band, evidence)

    @property
    def always_needed(self) -> tuple[str, ...]:
        return self.members[:1]

    def needed(self, member: str, scores: Members, images: int) -> NDArray[np.bool_]:
        gate = self.members[0]
        return super().needed(member, scores, images) if member == gate else self.undecided(scores[gate])

    def undecided(self, gate_scores: ArrayLike) -> NDArray[np.bool_]:
        """Which images the gate, from its scores [B], leaves to the second detector. Bool [B]."""
        return self.in_band(z_scores(self.calibration[self.members[0]], gate_scores))

    def score(self, members: Members) -> Array:
        gate, second = self.members
        gate_scores, second_scores = self.member_scores(members)
        z_gate, z_second = z_scores(self.calibration[gate], numbers(gate, gate_scores)), np.zeros(len(second_scores))
        in_band = self.in_band(z_gate)
        z_second[in_band] = z_scores(self.calibration[second], numbers(second, second_scores[in_band]))
        return self.ranked(z_gate, z_second)

    def score_calibration(self) -> Array:
        """See `Combined.score_calibration`. The band is of validation, and no calibration image has a part in it."""
        z_gate, z_second = (calibration_z_scores(self.calibration[name]) for name in self.members)
        return self.ranked(z_gate, z_second)

    def fitted_values(self) -> dict[str, Any]:
        band = [end if np.isfinite(end) else None for end in self.band]
        return {"band": band, **({"validation": dict(self.validation)} if self.validation else {})}

    @classmethod
    def restore(cls, settings: Combination, calibration: Members, values: Mapping[str, Any]) -> Self:
        low, high = values["band"]
        band = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
        return cls(settings, calibration, band, values.get("validation") or {})

    def in_band(self, z_gate: Array) -> NDArray[np.bool_]:
        """Whether images go on, by the gate's z-scores of them; bool [B]."""
        return np.asarray((z_gate > self.band[0]) & (z_gate < self.band[1]))

    def ranked(self, z_gate: Array, z_second: Array) -> Array:
        """Scores [B], from z-scores: what the gate clears under what it leaves open, and that under what it rejects."""
        low, high = self.band
        # No image lies beyond an infinite end, so that any number can stand for it.
        if np.isinf(high):
            high = 1.0 if np.isinf(low) else low + 1
        if np.isinf(low):
            low = high - 1
        inside = low + (high - low) * (0.5 + np.arctan(z_second) / np.pi)
        return np.where(self.in_band(z_gate), inside, z_gate)


@dataclass(frozen=True)
class _Trial:
    """What a band does to validation images.

    Attributes:
        losses: by group of OOD images, AUROC of the second detector minus that of the cascade.
        share: of a stream that goes on.
    """

    band: Band
    losses: Mapping[str, AurocLoss]
    share: float

    @property
    def mean_loss(self) -> float:
        return float(np.mean([loss.value for loss in self.losses.values()]))

    def upper(self, level: float, times: float = 1.0) -> dict[str, float]:
        """By group, an upper confidence bound of the loss; with so many times the images."""
        # Only an InD image that is rejected and an OOD image that is cleared can lose.
        cleared, rejected = np.isfinite(self.band[0]), np.isfinite(self.band[1])
        return {
            group: loss.upper(level, ind_unseen=bool(rejected), ood_unseen=bool(cleared), times=times)
            for group, loss in self.losses.items()
        }

    def passes(self, loss: float, level: float, times: float = 1.0) -> bool:
        return max(self.upper(level, times).values()) <= loss + 1e-12


@dataclass(frozen=True)
class _Validation:
    """Validation images, by what they are: "ind", or their group.

    Attributes:
        gate, second: their z-scores by both detectors.
        alone: their scores by the second.
    """

    gate: Mapping[str, Array]
    second: Mapping[str, Array]
    alone: Mapping[str, Array]

    @classmethod
    def of(cls, settings: Combination, calibration: Members, parts: Mapping[str, Members]) -> "_Validation":
        gate, second = (
            {part: z_scores(calibration[name], scores[name]) for part, scores in parts.items()} for name in settings.of
        )
        return cls(gate, second, {part: scores[settings.of[1]] for part, scores in parts.items()})

    @property
    def counts(self) -> dict[str, int]:
        return {part: len(scores) for part, scores in self.alone.items()}

    def bands(self, under: float, over: float) -> Iterator[Band]:
        """Bands that leave out growing shares of the stream, so much of them under the band and so much over it."""
        values, weights = self._stream
        for share in np.arange(1, STEPS + 1) / STEPS:
            low = _reaching(values, weights, under * share) if under else -np.inf
            high = _reaching(values[::-1], weights[::-1], over * share) if over else np.inf
            yield low, high

    def trial(self, cascade: Cascade) -> _Trial:
        ranked = {part: cascade.ranked(gate, self.second[part]) for part, gate in self.gate.items()}
        losses = {
            group: AurocLoss.of(alone, Placements.of(ranked["ind"], ranked[group]))
            for group, alone in self._placements.items()
        }
        share = {part: float(cascade.in_band(gate).mean()) for part, gate in self.gate.items()}
        return _Trial(cascade.band, losses, (share["ind"] + float(np.mean([share[g] for g in self._groups]))) / 2)

    def needed(self, trials: list[_Trial], loss: float, level: float) -> dict[str, int] | None:
        """How many images like these it takes for the first of these bands to pass; None: no number is enough."""
        times = 1.0
        while times <= MOST_TIMES:
            if any(trial.passes(loss, level, times) for trial in trials):
                return {part: int(np.ceil(count * times)) for part, count in self.counts.items()}
            times *= 1.1
        return None

    @cached_property
    def _placements(self) -> dict[str, Placements]:
        """Of the second detector alone, by group."""
        return {group: Placements.of(self.alone["ind"], self.alone[group]) for group in self._groups}

    @property
    def _groups(self) -> list[str]:
        return [part for part in self.alone if part != "ind"]

    @cached_property
    def _stream(self) -> tuple[Array, Array]:
        """The gate's z-scores, lowest first, and the part of a stream that each image stands for."""
        part_of_stream = {part: 0.5 if part == "ind" else 0.5 / len(self._groups) for part in self.gate}
        weights = np.concatenate([np.full(len(z), part_of_stream[part] / len(z)) for part, z in self.gate.items()])
        values = np.concatenate(list(self.gate.values()))
        order = np.argsort(values)
        return values[order], weights[order]


def _reaching(values: Array, weights: Array, share: float) -> float:
    """The first value up to which this share lies."""
    index = int(np.searchsorted(np.cumsum(weights), share - 1e-9))
    return float(values[min(index, len(values) - 1)])
