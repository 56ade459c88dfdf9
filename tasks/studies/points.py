"""Which points of a study a benchmark can have, and the runs that score them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffguard.distances import perceptual
from diffguard.errors import DataError, SettingError
from diffguard.settings import Variant
from tasks.common.text import known_name
from tasks.config.benchmark import load_benchmark
from tasks.config.choices import why_too_small
from tasks.config.current import current_run
from tasks.config.run import Choices, Run
from tasks.config.study import (
    DENOISER_GROUP,
    GROUP,
    Point,
    Study,
    expand,
    load_study,
    points_of,
    select,
    split_measure,
    where,
)


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """Points that cannot run, those of one reason in a line.

    Example:
        >>> left_out_lines({"a": "too small", "b": "too small"})
        ['left out: a, b: too small']
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


@dataclass(frozen=True)
class Planned:
    """A study on a benchmark, checked.

    Attributes:
        points: those that can run, in the order of the file.
        left_out: why each other one cannot, by its name.
        runs: the choices of each run, by its key; see `Point.run`.
    """

    name: str
    study: Study
    benchmark: str
    points: list[Point]
    left_out: dict[str, str]
    runs: dict[str | None, Choices]

    def open(self, key: str | None) -> Run:
        """A run of the study."""
        return current_run(**self.runs[key])


def plan_study(name: str, benchmark: str | None = None, **choices: Any) -> Planned:
    """Check a study on a benchmark, before any work.

    Args:
        benchmark: a file of data/benchmarks/, one of the study's or another; the study's first if not given.
        choices: others of `open_run`: limit, seeds, root, precision.

    Raises:
        SettingError: a key, value, row, measure or point is wrong; the message names file and field.
    """
    study = load_study(name)
    benchmark = benchmark or study.benchmarks[0]
    place = where(name)
    file = load_benchmark(benchmark)
    groups = ["ind", "near", "far", *file.ind, *file.ood, DENOISER_GROUP]
    if study.groups is not None:
        groups.append(GROUP)
    for measure in study.measure:
        group, _ = split_measure(measure)
        known_name(f"{place}: measure {measure!r}", [group] if group else [], groups)
    own = current_run(benchmark=benchmark, root=choices.get("root")).params
    points, left_out = [], dict[str, str]()
    variants = {point.row: variant for point, variant in expand(study, name)}
    for point in points_of(study, name, own):
        reason = _reason(variants[point.row], file.image.size) if point.row in variants else None
        if reason is None:
            points.append(point)
        else:
            left_out[point.name] = reason
    if not points:
        point_name, reason = next(iter(left_out.items()))
        raise SettingError(f"{place}: no point can run on {benchmark}; {point_name}: {reason}")
    runs: dict[str | None, Choices] = {}
    for point in points:
        run: Choices = runs.setdefault(
            point.run, {"benchmark": benchmark, "study": name, "point": point.run, "variants": [], **choices}
        )
        if point.row not in run["variants"]:
            run["variants"].append(point.row)
    for grouping in (study.groups or {}).values():
        for run in runs.values():
            if grouping.row is not None and grouping.row not in run["variants"]:
                run["variants"].append(grouping.row)
    planned = Planned(name, study, benchmark, points, left_out, runs)
    for key in runs:
        planned.open(key)
    _check_references(study, place, points)
    return planned


def _reason(variant: Variant, size: int) -> str | None:
    """Why a benchmark cannot have a variant: its images are too small for a distance, or that has no weights here."""
    if why := why_too_small(variant, size):
        return f"{why}; these have {size}"
    for distance in variant.distances:
        if distance in perceptual.URLS:
            try:
                perceptual.load(distance)
            except DataError as error:
                return str(error)
    return None


def _check_references(study: Study, place: str, points: list[Point]) -> None:
    """Check that what the study compares is among its points."""
    select(study.claim.of, points, f"{place}: claim.of")
    if not isinstance(study.claim.bound, int | float):
        select(study.claim.bound, points, f"{place}: claim.{'above' if study.claim.below is None else 'below'}")
    if study.compare is not None:
        axis, to = study.compare.axis, study.compare.to
        select(str(to) if axis is None else {axis: to}, points, f"{place}: compare.to")
