"""Several detectors as one: fusion of calibrated scores, regression on a control, and cascades.

A kind of combination is a class, a module each; `diffguard.settings.COMBINATION_KINDS` names them. Nothing here is
fitted on OOD images but what is chosen on validation: the band of a cascade, which rows a fusion is of, and how much
they weigh.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from diffguard.calibration.conformal import Array, numbers
from diffguard.errors import DataError, SettingError
from diffguard.settings import COMBINATION_KINDS, Combination
from diffguard.utils.importing import import_object

Members = Mapping[str, Array]
"""Outlier scores [N] of the same images, by the name of the row that they are of."""

Sides = tuple[Members, Mapping[str, Members]]
"""Scores of the InD images of a split, and of its OOD images by their group (near, far)."""

Cost = Callable[[Sequence[str]], float]
"""Network evaluations per image that rows, by their names, need together."""


@dataclass(frozen=True)
class Combined(ABC):
    """A combination, fitted on InD calibration images.

    Attributes:
        settings: its kind, and the rows that it is made of.
        calibration: by the name of the member row, its scores of the calibration images [n].

    Example:
        >>> calibration = {"a": np.arange(99.0), "b": np.arange(99.0)}
        >>> fused = fit_combination(Combination(kind="z-sum", of=("a", "b")), calibration)
        >>> fused.score({"a": np.array([49.0, 98.0]), "b": np.array([49.0, 40.0])}).round(2)
        array([0. , 2.1])
    """

    settings: Combination
    calibration: Members

    @classmethod
    @abstractmethod
    def fit(
        cls, settings: Combination, calibration: Members, validation: Sides | None, cost: Cost | None = None
    ) -> Self:
        """Fit it; see `fit_combination`."""

    @abstractmethod
    def score(self, members: Members) -> Array:
        """Outlier scores [B], higher = more OOD.

        Args:
            members: by the name of each member row, its scores [B]; NaN where `needed` says that there need be none.

        Raises:
            DataError: a member or one of its scores is missing.
        """

    @abstractmethod
    def score_calibration(self) -> Array:
        """The scores of the calibration images themselves [n], each fitted on the n - 1 others.

        Only so are they what a new InD image's score is compared with.
        """

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the rows whose scores it needs, in the order in which they are scored."""
        return self.settings.of

    @property
    def always_needed(self) -> tuple[str, ...]:
        """The members whose scores are needed of every image."""
        return self.members

    def needed(self, member: str, scores: Members, images: int) -> NDArray[np.bool_]:
        """Of which images a member's score is needed, bool [B].

        Args:
            scores: [B] of the members before it.
            images: B, how many there are.
        """
        return np.ones(images, dtype=bool)

    def fitted_values(self) -> dict[str, Any]:
        """What was fitted beside the calibration scores, as plain values by name.

        "validation" among them is what a choice on validation is based on, and "members" those of `of` that were
        chosen.
        """
        return {}

    @classmethod
    def restore(cls, settings: Combination, calibration: Members, values: Mapping[str, Any]) -> Self:
        """From `fitted_values`."""
        return cls(settings, calibration)

    def to_json(self) -> dict[str, Any]:
        """What was fitted, as plain values, but for the calibration scores; an infinite end of a band is None."""
        settings = self.settings.model_dump(mode="json")
        return {"settings": settings, "band": None, "line": None, **self.fitted_values()}

    @staticmethod
    def from_json(values: Mapping[str, Any], calibration: Members) -> "Combined":
        """From `to_json` and the member rows' scores of the calibration images."""
        settings = Combination.model_validate(values["settings"])
        members = values.get("members") or settings.of
        return _kind(settings).restore(settings, _of_members(settings.kind, members, calibration), values)

    def member_scores(self, members: Members) -> list[Array]:
        """The members' scores in their order.

        Raises:
            DataError: a member is missing.
        """
        if missing := [name for name in self.members if name not in members]:
            raise DataError(f"{self.settings.kind}: scores of {missing[0]} are missing")
        return [np.asarray(members[name], float) for name in self.members]

    def checked_scores(self, members: Members) -> list[Array]:
        """`member_scores` of a kind that needs all of them.

        Raises:
            DataError: a member is missing, or one of its scores is not a number.
        """
        return [numbers(name, scores) for name, scores in zip(self.members, self.member_scores(members), strict=True)]


def fit_combination(
    settings: Combination, calibration: Members, validation: Sides | None = None, cost: Cost | None = None
) -> Combined:
    """Fit a combination.

    Args:
        calibration: by the name of each member row, its scores of InD calibration images [n].
        validation: of a kind that needs it, the same of the validation split's InD images, and of its OOD images by
            group.
        cost: of a kind that chooses its members, by which it decides between equal ones; None: they cost alike.

    Raises:
        SettingError: of a kind that chooses there are no validation images of both kinds, or a group has none.
        DataError: a member or one of its scores is missing.
    """
    return _kind(settings).fit(settings, _of_members(settings.kind, settings.of, calibration), validation, cost)


def _kind(settings: Combination) -> type[Combined]:
    kind: type[Combined] = import_object(COMBINATION_KINDS[settings.kind].implementation)
    return kind


def checked_sides(settings: Combination, validation: Sides | None) -> dict[str, Members]:
    """Scores of validation images by what these are: "ind", then the groups of OOD images.

    Raises:
        SettingError: there are no images of both kinds, or a group has none.
    """
    ind, groups = validation or ({}, {})
    parts = {"ind": ind, **groups}
    if not groups or not all(len(part.get(name, ())) for part in parts.values() for name in settings.of):
        raise SettingError(
            f"the {settings.kind} of {', '.join(settings.of)} needs InD and OOD images in the validation split"
        )
    return {part: {name: numbers(name, scores[name]) for name in settings.of} for part, scores in parts.items()}


def check_candidates(settings: Combination, names: Iterable[str]) -> None:
    """Raise a DataError if a row that was chosen is none of a combination's."""
    if unknown := [name for name in names if name not in settings.of]:
        raise DataError(f"{settings.kind}: {unknown[0]!r} is not one of {', '.join(settings.of)}")


def _of_members(kind: str, names: Iterable[str], calibration: Members) -> Members:
    """The member rows' calibration scores, checked to be numbers."""
    if missing := [name for name in names if name not in calibration]:
        raise DataError(f"{kind}: calibration scores of {missing[0]} are missing")
    return {name: numbers(name, calibration[name]) for name in names}
