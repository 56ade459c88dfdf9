"""A study of data/studies/, as typed objects: a grid of settings, what is measured at its points, a claim to check."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffguard.errors import DataError, SettingError
from diffguard.settings import DistanceName, Settings, Variant, parse_settings
from diffguard.utils.text import read_text
from tasks.common.text import known_name, read_yaml
from tasks.config import project
from tasks.config.benchmark import Benchmark, Name, load_benchmark
from tasks.config.changes import CHANGES
from tasks.config.choices import check_choosing, of_size, see_train
from tasks.config.params import Params

Value = bool | int | float | str | None
"""Of an axis at a point."""

OOD_METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out", "error")
SHARE_METRICS = ("rejected", "accuracy")
"""Shares of InD images: their intervals are exact (Clopper and Pearson), unless several training seeds are pooled."""
MEAN_METRICS = ("evaluations", "stop", "score", *SHARE_METRICS)
DENOISER_METRICS = ("accuracy", "error", "parameters", "macs", "training_macs")
"""Of the denoiser: as a classifier of InD images; and its cost, of which no interval is needed."""
METRICS = tuple(dict.fromkeys((*OOD_METRICS, *MEAN_METRICS, *DENOISER_METRICS, "promised")))

GROUP, DENOISER_GROUP = "group", "denoiser"
"""What measures have in place of a dataset's name: a point's group of OOD images, or the denoiser."""

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
"""Points: one by its name, those of a line by its name, or those with these values of axes (``line`` and ``row`` are
two too)."""


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
        panels: an axis with a panel for each value, in place of one for each classifier.
        log: axes of the figure that are logarithmic.
    """

    x: str | None = None
    y: list[str] = Field(min_length=1)
    panels: str | None = None
    log: list[Literal["x", "y"]] = Field(default_factory=list)


class Grouping(Settings):
    """How OOD test images are told apart; without `row` and `file` by their dataset.

    Attributes:
        row: whose scores, of low to high, are cut into parts of equal size: part 1 is nearest to InD.
        parts: how many.
        file: a place in the project: YAML, {group: [names of OOD classes or datasets]}, or CSV with the columns
            name and group.
        of: the OOD images that are meant.
    """

    row: str | None = None
    parts: int = Field(default=4, ge=2, le=20)
    file: str | None = None
    of: Literal["near", "far", "all"] = "all"

    @model_validator(mode="after")
    def _one_kind(self) -> "Grouping":
        if self.row is not None and self.file is not None:
            raise ValueError("row, file: give one of them")
        if self.row is None and "parts" in self.model_fields_set:
            raise ValueError("parts: they are of a row's scores; give row")
        return self


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
        models: base has keys in place of those of the benchmark's models, by their names ("denoiser", or a
            classifier's; see `tasks.config.models.with_models`); its grid's axes set further ones, as
            ``denoiser.iterations``. Every row and variant is a point under each.
        changes: strengths of changes of InD test images, by kind; see `tasks.config.changes`. Every row and variant
            is a point without any, and under each.
        cams: show where each run's classifiers look, by GradCAM, on so many InD and as many OOD test images.
        groups: every row and variant is a point for each group of each of these groupings, by name.
        limit: the most images of each dataset of validation and test.
        measure: ``<group> <metric>``, where a group is near, far, ind or a dataset, and a metric one of `METRICS`;
            those of `MEAN_METRICS` are measured without a group too: ``rejected`` and ``accuracy``, the classifier's,
            on InD, the others on all images. ``promised`` is the rate of rejections that calibration promises;
            ``group <metric>`` is of the point's group of `groups`; ``denoiser <metric>`` one of `DENOISER_METRICS`.
    """

    title: str
    question: str
    claim: Claim
    benchmarks: list[str] = Field(min_length=1)
    classifiers: list[str] | None = Field(default=None, min_length=1)
    rows: list[str] | Literal["all"] = Field(default_factory=list)
    variants: dict[Name, Grid] = Field(default_factory=dict)
    models: Grid | None = None
    changes: dict[str, Annotated[list[float], Field(min_length=1)]] | None = Field(default=None, min_length=1)
    groups: dict[str, Grouping] | None = Field(default=None, min_length=1)
    limit: int | None = Field(default=None, ge=1)
    compare: Compare | None = None
    measure: list[str] = Field(min_length=1)
    figure: Figure
    curve: Curve | None = None
    cams: int | None = Field(default=None, ge=1, le=20)

    @model_validator(mode="after")
    def _measured(self) -> "Study":
        if not self.variants and not self.rows:
            raise ValueError("variants, rows: the study has no point")
        for name in self.measure:
            split_measure(name)
        for option, names in {"figure.y": self.figure.y, "claim.measure": [self.claim.measure]}.items():
            known_name(option, names, self.measure)
        if sum(each is not None for each in (self.models, self.changes, self.groups)) > 1:
            raise ValueError("models, changes, groups: a study has one of them")
        return self


@dataclass(frozen=True)
class Setup:
    """What the rows of a study are scored under: models and a change of images.

    Attributes:
        key: of its run; see `Point.run`.
        axes: its value of each axis.
        models, change: choices of `tasks.config.run.open_run`.
    """

    key: str | None = None
    axes: Mapping[str, Value] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] | None = None
    change: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a study: a row of the result table of one of its runs.

    Attributes:
        name: what it is called, in tables and in MLflow.
        line: the key of `Study.variants` that it comes from, or "rows".
        axes: its value of each axis, by the axis' short name.
        run: the key of its run within the study, which the choice ``point`` of a run is; None: the study's only one.
        row: the name of its row in that run.
        grouping: the key of `Study.groups` that its axis "group" is of.
    """

    name: str
    line: str
    axes: Mapping[str, Value]
    run: str | None
    row: str
    grouping: str | None = None


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
        known_name(f"measure: without a group, {name!r}", [metric], [*MEAN_METRICS, "promised"])
    elif group == DENOISER_GROUP:
        known_name(f"measure: {name!r}", [metric], DENOISER_METRICS)
    else:
        known_name(f"measure: {name!r}", [metric], [*OOD_METRICS, *MEAN_METRICS])
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
    axes |= {axis for setup in setups(study, name) for axis in setup.axes}
    axes |= {"by", "group"} if study.groups is not None else set()
    if study.figure.panels is not None:
        known_name(f"{where(name)}: figure.panels", [study.figure.panels], sorted(axes))
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


def setups(study: Study, name: str) -> list[Setup]:
    """What the rows of a study are scored under, in the order of its file; as they are, if it says nothing of it.

    Raises:
        SettingError: a change or a model's keys are wrong; the message names file and field.
    """
    if study.changes is not None:
        made = [Setup(None, {"change": "none"})]
        for kind, strengths in study.changes.items():
            known_name(f"{where(name)}: changes", [kind], CHANGES)
            for strength in strengths:
                change = {"kind": kind, CHANGES[kind].strength: strength}
                parse_settings(CHANGES[kind], change, f"{where(name)}: changes.{kind}")
                made.append(Setup(f"{kind} {strength:g}", {"change": kind, "strength": strength}, change=change))
        return made
    if study.models is None:
        return [Setup()]
    made = []
    for axes, keys in combinations(study.models.grid):
        key = _row_name("", axes, study.models.grid).strip() or None
        values = deepcopy(study.models.base)
        place = f"{where(name)}: models: {key or 'base'}"
        for setting, value in keys.items():
            _set(values, setting, value, place)
        for model, settings in values.items():
            if not isinstance(settings, dict):
                raise SettingError(f"{place}: {model}: {settings!r} is no mapping of a model's keys")
            for setting in ("path", "weights"):
                if setting in settings and settings[setting] is None:
                    raise SettingError(f"{place}: {model}.{setting} is empty; write there which folder or file to take")
        made.append(Setup(key, axes, models=values))
    return made


def setup_of(study: Study, name: str, key: str | None) -> Setup:
    """The setup of a study's run; see `Point.run`.

    Raises:
        SettingError: the study has no such run.
    """
    made = {setup.key: setup for setup in setups(study, name)}
    if key not in made:
        known_name(f"{where(name)}: point", [str(key)], [str(each) for each in made])
    return made[key]


def points_of(study: Study, name: str, own: Params) -> list[Point]:
    """All points of a study on a benchmark.

    Args:
        own: params.yaml as it is for the benchmark.
    """
    rows = own.names if study.rows == "all" else study.rows
    scored = [Point(row, ROWS, {}, None, row) for row in rows] + [point for point, _ in expand(study, name)]
    if study.groups is not None:
        return [
            replace(
                point, name=f"{point.name}, {by} {group}", axes={**point.axes, "by": by, "group": group}, grouping=by
            )
            for point in scored
            for by, grouping in study.groups.items()
            for group in group_values(grouping, own.benchmark, name)
        ]
    return [
        replace(
            point,
            name=point.name if setup.key is None else f"{point.name}, {setup.key}",
            axes={**point.axes, **setup.axes},
            run=setup.key,
        )
        for point in scored
        for setup in setups(study, name)
    ]


def group_values(grouping: Grouping, benchmark: str, name: str) -> list[Value]:
    """The groups of a grouping: 1 to `parts`, or names."""
    if grouping.row is not None:
        return list(range(1, grouping.parts + 1))
    if grouping.file is not None:
        return list(read_groups(grouping.file, where(name)))
    file = load_benchmark(benchmark)
    datasets = {"near": file.near, "far": file.far, "all": file.ood}[grouping.of]
    return [dataset for dataset, each in datasets.items() if "test" in each.splits]


def read_groups(file: str, place: str) -> dict[str, list[str]]:
    """Names of OOD classes or datasets, by group.

    Raises:
        DataError: the file is missing. SettingError: it has another form, or a name is in two groups.
    """
    path = project.ROOT / file
    if path.suffix.lower() == ".csv":
        if not path.is_file():
            raise DataError(f"{place}: groups: {file}: no such file")
        groups: dict[str, list[str]] = {}
        for row in csv.DictReader(read_text(path).splitlines()):
            if not {"name", "group"} <= row.keys():
                raise SettingError(f"{file}: its columns are not name and group")
            groups.setdefault(row["group"], []).append(row["name"])
    else:
        groups = parse_settings(dict[str, list[str]], read_yaml(path), file)
    names = [each for of_group in groups.values() for each in of_group]
    if twice := [each for each in names if names.count(each) > 1]:
        raise SettingError(f"{file}: {twice[0]} is in two groups")
    if not names:
        raise SettingError(f"{file}: there is no group")
    return groups


def of_study(own: Params, pool: Params, benchmark: Benchmark, study: Study, name: str, key: str | None) -> Params:
    """params.yaml with the rows of a study's run in place of its own.

    Args:
        own: params.yaml as it is for the benchmark.
        pool: with all rows of params.yaml and the benchmark.
        key: of the run within the study; see `Point.run`.

    Raises:
        SettingError: a row or classifier is unknown, or a point has the name of a row.
    """
    points = [point for point in points_of(study, name, own) if point.run == key]
    if study.classifiers is not None:
        known_name(f"{where(name)}: classifiers", study.classifiers, benchmark.classifiers)
    variants = {point.row: variant for point, variant in expand(study, name)}
    rows = list(dict.fromkeys(point.row for point in points if point.line == ROWS))
    rows += [each.row for each in (study.groups or {}).values() if each.row is not None and each.row not in rows]
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
            if all(
                {"line": point.line, "row": point.row, **point.axes}.get(axis, ...) == value
                for axis, value in selector.items()
            )
        ]
    else:
        chosen = [point for point in points if point.name == selector] or [
            point for point in points if point.line == selector
        ]
    if not chosen:
        known = dict.fromkeys([*(point.line for point in points), *(point.name for point in points)])
        raise SettingError(f"{option}: {selector!r} selects no point; there are {', '.join(known)}")
    return chosen
