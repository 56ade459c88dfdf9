"""A study of data/studies/, as typed objects: a grid of settings, what is measured at its points, a claim to check."""

import itertools
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffguard.errors import SettingError
from diffguard.settings import DistanceName, Settings, Variant, parse_settings
from tasks.common.text import known_name, read_yaml
from tasks.config import project
from tasks.config.benchmark import Benchmark, Name
from tasks.config.choices import check_choosing, of_size, see_train
from tasks.config.params import Params

Value = bool | int | float | str | None
"""Of an axis at a point."""

OOD_METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out")
MEAN_METRICS = ("evaluations", "stop", "score", "rejected")
METRICS = (*OOD_METRICS, *MEAN_METRICS)

Axis = Annotated[list[Value], Field(min_length=1)] | Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
"""Values of the setting that the axis is called after, or named choices that each set some."""


class Grid(Settings):
    """Points: a variant, times its grid.

    Attributes:
        base: settings of a variant (`diffguard.settings.Variant`).
        grid: axes. ``guidance.scale: [0, 1, 2]`` sets the key of that name, dots leading inside; a mapping gives
            choices by name, each with the keys that it sets. Every combination of the axes' values is a point.
    """

    base: dict[str, Any]
    grid: dict[str, Axis] = Field(default_factory=dict)


Selector = str | dict[str, Value]
"""Points: one by its name, those of a line by its name, or those with these values of axes (``line`` is one too)."""


class Claim(Settings):
    """What the conclusion is checked against: that a measure of some points is above, or below, a number or others'.

    Attributes:
        says: the claim, as the end of a sentence that begins with "that".
        source: where it is made.
        of, above, below: of several points that they select, the one with the best mean AUROC on validation counts.
    """

    says: str
    source: str
    measure: str
    of: Selector
    above: float | Selector | None = None
    below: float | Selector | None = None

    @property
    def bound(self) -> float | Selector:
        """What the measure is compared with."""
        bound = self.below if self.above is None else self.above
        assert bound is not None
        return bound

    @model_validator(mode="after")
    def _one_bound(self) -> "Claim":
        if (self.above is None) == (self.below is None):
            raise ValueError("exactly one of above and below is needed")
        return self


class Compare(Settings):
    """Which points get paired differences.

    Attributes:
        to: a point; with `axis`, one of its values.
        axis: each point is compared with the one that has `to` there and is the same elsewhere. None: every point is
            compared with the point `to`.
    """

    to: Value
    axis: str | None = None


class Figure(Settings):
    """The study's figure: a panel for each `y`, with 95 % intervals.

    Attributes:
        x: an axis or a measure; None: the points are listed.
        y: measures.
        log: axes of the figure that are logarithmic.
    """

    x: str | None = None
    y: list[str] = Field(min_length=1)
    log: list[Literal["x", "y"]] = Field(default_factory=list)


class Curve(Settings):
    """How alike the noisy latents of an inversion are to the image, by noise level, for each dataset.

    Attributes:
        base: settings of the variant whose inversion it is.
        similarities: ``psnr``, or a distance d, whose similarity is 1 - d.
        images: the most of each dataset.
        at: the level where InD is compared with OOD.
    """

    base: dict[str, Any]
    similarities: list[Literal["psnr"] | DistanceName] = Field(min_length=1)
    images: int = Field(default=100, ge=2)
    at: int = Field(ge=1)


class Study(Settings):
    """A study: its points, what is measured at them, and how it is shown.

    Attributes:
        benchmarks: those that it is made for; the first is the default.
        classifiers: of the benchmark; None: all that are guarded.
        rows: rows of params.yaml and the benchmark that are points too; ``all``: the benchmark's own.
        variants: the lines of points, by name.
        limit: the most images of each dataset of validation and test.
        measure: ``<group> <metric>``, where a group is near, far, ind or a dataset, and a metric one of `METRICS`;
            those of `MEAN_METRICS` are measured without a group too: ``rejected`` on InD, the others on all images.
    """

    title: str
    question: str
    claim: Claim
    benchmarks: list[str] = Field(min_length=1)
    classifiers: list[str] | None = Field(default=None, min_length=1)
    rows: list[str] | Literal["all"] = Field(default_factory=list)
    variants: dict[Name, Grid] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    compare: Compare | None = None
    measure: list[str] = Field(min_length=1)
    figure: Figure
    curve: Curve | None = None

    @model_validator(mode="after")
    def _measured(self) -> "Study":
        if not self.variants and not self.rows:
            raise ValueError("variants, rows: the study has no point")
        for name in self.measure:
            split_measure(name)
        for option, names in {"figure.y": self.figure.y, "claim.measure": [self.claim.measure]}.items():
            known_name(option, names, self.measure)
        return self


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a study: a row of the result table of one of its runs.

    Attributes:
        name: what it is called, in tables and in MLflow.
        line: the key of `Study.variants` that it comes from, or "rows".
        axes: its value of each axis, by the axis' short name.
        run: the key of its run within the study, which the choice ``point`` of a run is; None: the study's only one.
        row: the name of its row in that run.
    """

    name: str
    line: str
    axes: Mapping[str, Value]
    run: str | None
    row: str


ROWS = "rows"
"""The line of points that are rows of params.yaml."""


def split_measure(name: str) -> tuple[str | None, str]:
    """Group and metric of a measure.

    Raises:
        UnknownNameError: there is no such metric.

    Example:
        >>> split_measure("near auroc"), split_measure("evaluations")
        (('near', 'auroc'), (None, 'evaluations'))
    """
    group, _, metric = name.rpartition(" ")
    known_name("measure", [metric], METRICS)
    if not group:
        known_name(f"measure: without a group, {name!r}", [metric], MEAN_METRICS)
    return group or None, metric


def studies_folder() -> Any:
    """data/studies/."""
    return project.ROOT / "data" / "studies"


def where(name: str) -> str:
    """A study's file, as messages name it."""
    return f"data/studies/{name}.yaml"


def load_study(name: str) -> Study:
    """Read data/studies/<name>.yaml and check all points that do not depend on a benchmark.

    Raises:
        SettingError: there is no such study, or its file has a wrong key, value or point.
    """
    folder = studies_folder()
    known_name("study", [name], sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "dvc"))
    study = parse_settings(Study, read_yaml(folder / f"{name}.yaml"), where(name))
    expanded = expand(study, name)
    axes = {axis for point, _ in expanded for axis in point.axes}
    if study.figure.x is not None:
        known_name(f"{where(name)}: figure.x", [study.figure.x], [*sorted(axes), *study.measure])
    if study.compare is not None and study.compare.axis is not None:
        known_name(f"{where(name)}: compare.axis", [study.compare.axis], sorted(axes))
    if study.curve is not None:
        levels = parse_settings(Variant, study.curve.base, f"{where(name)}: curve.base").levels
        if study.curve.at > levels:
            raise SettingError(f"{where(name)}: curve.at: level {study.curve.at} is not within 1..{levels}")
    return study


def expand(study: Study, name: str) -> list[tuple[Point, Variant]]:
    """The points of a study's variants, in the order of its file.

    Raises:
        SettingError: a point is no variant, or two have the same settings; the message names file and field.
    """
    points: list[tuple[Point, Variant]] = []
    for line, grid in study.variants.items():
        for axes, changes in combinations(grid.grid):
            row = _row_name(line, axes, grid.grid)
            place = f"{where(name)}: variants.{line}: {row}"
            if len(row) > 80:
                raise SettingError(f"{place}: the name of a point has at most 80 characters; shorten the line's")
            values = deepcopy(grid.base)
            for key, value in changes.items():
                _set(values, key, value, place)
            points.append((Point(row, line, axes, None, row), parse_settings(Variant, values, place)))
    seen: dict[str, str] = {}
    for point, variant in points:
        settings = variant.model_dump_json()
        if settings in seen:
            raise SettingError(f"{where(name)}: {seen[settings]} and {point.name} have the same settings; drop one")
        seen[settings] = point.name
    return points


def combinations(grid: Mapping[str, Axis]) -> list[tuple[dict[str, Value], dict[str, Any]]]:
    """Every combination of the axes' values, with the keys that it sets.

    Example:
        >>> combinations({"guidance.scale": [0, 2], "stop": {"early": {"stop.median_at": 4}}})[1]
        ({'scale': 2, 'stop': 'early'}, {'guidance.scale': 2, 'stop.median_at': 4})
    """
    axes: list[list[tuple[str, Value, dict[str, Any]]]] = []
    for key, values in grid.items():
        short = key.rpartition(".")[2]
        if isinstance(values, dict):
            axes.append([(short, choice, changes) for choice, changes in values.items()])
        else:
            axes.append([(short, value, {key: value}) for value in values])
    return [
        (
            {short: value for short, value, _ in chosen},
            {key: value for _, _, changes in chosen for key, value in changes.items()},
        )
        for chosen in itertools.product(*axes)
    ]


def _row_name(line: str, axes: Mapping[str, Value], grid: Mapping[str, Axis]) -> str:
    """A readable name: choices by their names, numbers with their setting's."""
    is_named = {key.rpartition(".")[2]: isinstance(values, dict) for key, values in grid.items()}
    return " ".join([line, *(str(value) if is_named[axis] else f"{axis}={value}" for axis, value in axes.items())])


def _set(values: dict[str, Any], key: str, value: Any, place: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SettingError(
                f"{place}: {key}: {parent} is {values!r} in base, which has no {last}; give it as a mapping"
            )
    values[last] = deepcopy(value)


def points_of(study: Study, name: str, own: Params) -> list[Point]:
    """All points of a study on a benchmark.

    Args:
        own: params.yaml as it is for the benchmark.
    """
    rows = own.names if study.rows == "all" else study.rows
    return [Point(row, ROWS, {}, None, row) for row in rows] + [point for point, _ in expand(study, name)]


def of_study(own: Params, pool: Params, benchmark: Benchmark, study: Study, name: str, key: str | None) -> Params:
    """params.yaml with the rows of a study's run in place of its own.

    Args:
        own: params.yaml as it is for the benchmark.
        pool: with all rows of params.yaml and the benchmark.
        key: of the run within the study; see `Point.run`.

    Raises:
        SettingError: a row or classifier is unknown, or a point has the name of a row.
    """
    points = points_of(study, name, own)
    known_name(f"{where(name)}: point", [] if key is None else [key], [point.run for point in points if point.run])
    if study.classifiers is not None:
        known_name(f"{where(name)}: classifiers", study.classifiers, benchmark.classifiers)
    variants = {point.row: variant for point, variant in expand(study, name) if point.run == key}
    rows = [point.row for point in points if point.line == ROWS and point.run == key]
    known_name(f"{where(name)}: rows", rows, pool.names)
    kept = pool.only(rows)
    for row, variant in variants.items():
        if row in pool.names:
            raise SettingError(f"{where(name)}: variants: {row} is the name of a row of params.yaml; choose another")
        for other in rows:
            if other in kept.score.variants and kept.score.variants[other] == variant:
                raise SettingError(f"{where(name)}: {other} and {row} have the same settings; drop one")
    score = kept.score.model_copy(update={"variants": {**kept.score.variants, **variants}})
    params = of_size(
        own.model_copy(
            update={"score": score, "combine": kept.combine, "classifiers": study.classifiers or own.classifiers}
        ),
        benchmark,
    )
    see_train(f"{where(name)}: rows", params, benchmark)
    check_choosing(params, benchmark)
    return params


def select(selector: Selector, points: Sequence[Point], option: str) -> list[Point]:
    """The points that a selector means.

    Raises:
        SettingError: there is none.
    """
    if isinstance(selector, dict):
        chosen = [
            point
            for point in points
            if all({"line": point.line, **point.axes}.get(axis, ...) == value for axis, value in selector.items())
        ]
    else:
        chosen = [point for point in points if point.name == selector] or [
            point for point in points if point.line == selector
        ]
    if not chosen:
        known = dict.fromkeys([*(point.line for point in points), *(point.name for point in points)])
        raise SettingError(f"{option}: {selector!r} selects no point; there are {', '.join(known)}")
    return chosen
