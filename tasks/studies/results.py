"""What a study measured: each point with 95 % intervals, paired differences, and whether the claim is borne out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffguard.metrics import Resampled, bootstrap_weights
from diffguard.version import METHOD_VERSION, __version__
from tasks.calibrate import check_orders, conformal
from tasks.combine import evaluations, fitted, score_tables
from tasks.config.run import Run
from tasks.config.study import OOD_METRICS, ROWS, Point, Selector, select, split_measure, where
from tasks.evaluate.stage import resampled
from tasks.score.plan import Tables, plan
from tasks.studies.points import Planned

Draws = NDArray[np.float64]
"""A measure on the images themselves, and on every bootstrap draw of them, [R + 1]; NaN: not known."""

Interval = dict[str, float]
"""value, low and high: a measure with its 95 % interval."""


@dataclass(frozen=True)
class Measured:
    """The score tables of a study's runs, and measures of them."""

    planned: Planned
    runs: Mapping[str | None, tuple[Run, Tables]]

    @classmethod
    def of(cls, planned: Planned) -> "Measured":
        """Read the scores of a study, all of which are there."""
        runs = {}
        for key in planned.runs:
            run = planned.open(key)
            runs[key] = run, score_tables(run, plan(run))
            check_orders(*runs[key])
        return cls(planned, runs)

    def run(self, point: Point) -> Run:
        """The run that a point is a row of."""
        return self.runs[point.run][0]

    def draws(self, point: Point, classifier: str, measure: str, split: str = "test") -> Draws | None:
        """A measure of a point; None: the benchmark lacks the images, or it is not known.

        All points share the draws of images, so that a difference of two has the interval of a paired bootstrap.
        With several training seeds a draw samples them too, but for means, which are of each image's mean over them.
        """
        run, tables = self.runs[point.run]
        by_seed = [tables[classifier, point.row, seed] for seed in run.params.seeds]
        by_seed = [table[table["split"] == split] for table in by_seed]
        group, metric = split_measure(measure)
        if metric in OOD_METRICS:
            return self._ood_draws(point, classifier, str(group), metric, split)
        rows = _rows(by_seed[0], group or ("ind" if metric == "rejected" else None))
        if not rows.any():
            return None
        values = np.mean(
            [self._of_images(run, point, classifier, metric, seed, split) for seed in run.params.seeds], axis=0
        )[rows]
        weights = _weights(len(values), run.params.evaluate.draws, run.params.evaluate.seed)
        return None if np.isnan(values).any() else weights @ values / weights.sum(axis=1)

    def _ood_draws(self, point: Point, classifier: str, group: str, metric: str, split: str) -> Draws | None:
        key = point, classifier, split
        if key not in self._resampled:
            run, tables = self.runs[point.run]
            self._resampled[key] = resampled(run, tables, classifier, point.row, split, self._metrics)
        found = self._resampled[key]
        if found is None or group not in found.by_seed:
            return None
        pooled: Draws = (found.by_seed[group][metric] * found.seed_weights.T).sum(axis=0)
        return pooled

    @cached_property
    def _metrics(self) -> list[str]:
        asked = {split_measure(measure)[1] for measure in self.planned.study.measure}
        return [metric for metric in OOD_METRICS if metric == "auroc" or metric in asked]

    @cached_property
    def _resampled(self) -> dict[tuple[Point, str, str], Resampled | None]:
        return {}

    def _of_images(
        self, run: Run, point: Point, classifier: str, metric: str, seed: int, split: str
    ) -> NDArray[np.float64]:
        whole = self.runs[point.run][1][classifier, point.row, seed]
        table = whole[whole["split"] == split]
        if metric == "score":
            return table["score"].to_numpy(float)
        if metric == "rejected":
            return conformal(run, whole).rejects(table["score"], table["predicted"]).astype(float)
        if metric == "stop":
            return table["steps"].to_numpy(float)
        combination, members = run.params.combine.get(point.row), None
        if combination is not None and combination.chooses:
            members = fitted(run, self.runs[point.run][1], classifier, point.row, seed).members
        return evaluations(run, point.row, table["steps"], members)


def results(planned: Planned) -> dict[str, Any]:
    """Everything that a study's table, figure, page and runs in MLflow are made of, as plain values.

    Returns:
        ``points``: of each classifier, {"name", "line", "axes", "classifier", "measures": {measure: interval or
        None}}; ``differences``: {"of", "to", "classifier", "measures"}; ``claim``: of each classifier, see
        `check_claim`; beside them what they are of. Shares are in [0, 1].
    """
    measured, study = Measured.of(planned), planned.study
    first = measured.run(planned.points[0])
    test = first.scored[first.scored["split"] == "test"]
    points, differences, claims = [], [], []
    for classifier in first.params.classifiers:
        draws = {
            (point.name, measure): measured.draws(point, classifier, measure)
            for point in planned.points
            for measure in study.measure
        }
        for point in planned.points:
            points.append(
                {
                    "name": point.name,
                    "line": point.line,
                    "axes": dict(point.axes),
                    "classifier": classifier,
                    "measures": {measure: interval(draws[point.name, measure]) for measure in study.measure},
                }
            )
        for of, to in pairs(planned):
            measures = {
                measure: interval(_difference(draws[of.name, measure], draws[to.name, measure]))
                for measure in study.measure
            }
            differences.append({"of": of.name, "to": to.name, "classifier": classifier, "measures": measures})
        claims.append(check_claim(measured, classifier))
    return {
        "study": planned.name,
        "title": study.title,
        "benchmark": planned.benchmark,
        "version": __version__,
        "method_version": METHOD_VERSION,
        "images": {role: int(count) for role, count in test["role"].value_counts().items()},
        "datasets": dict(test.groupby("dataset", sort=False)["role"].first()),
        "limit": first.limit,
        "classifiers": first.params.classifiers,
        "seeds": first.params.seeds,
        "draws": first.params.evaluate.draws,
        "left_out": planned.left_out,
        "points": points,
        "differences": differences,
        "claim": claims,
    }


def interval(draws: Draws | None) -> Interval | None:
    """A measure with its 95 % interval; None: it is not known."""
    if draws is None:
        return None
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}


def pairs(planned: Planned) -> list[tuple[Point, Point]]:
    """The points that are compared, each with what it is compared to."""
    compare, points = planned.study.compare, planned.points
    if compare is None:
        return []
    place = f"{where(planned.name)}: compare.to"
    if compare.axis is None:
        [to, *_] = select(str(compare.to), points, place)
        return [(point, to) for point in points if point != to]
    found = []
    for point in points:
        if compare.axis not in point.axes or point.axes[compare.axis] == compare.to:
            continue
        same = {**point.axes, compare.axis: compare.to}
        found += [(point, to) for to in points if to.line == point.line and to.axes == same]
    return found


def check_claim(measured: Measured, classifier: str) -> dict[str, Any]:
    """Whether a study's claim is borne out under a classifier.

    Returns:
        "of" and "value": the point, and its measure with interval; "to", "to_value": what it is compared with, if that
        is a point; "bound": if it is a number; "difference": with the interval of the difference itself; "verdict":
        ``yes`` or ``no`` where the whole interval is on one side, else ``open``; "chosen": the points that validation
        chose.
    """
    study, chosen = measured.planned.study, list[str]()
    claim = study.claim

    def draws(selector: Selector, option: str) -> tuple[str, Draws | None]:
        candidates = select(selector, measured.planned.points, f"{where(measured.planned.name)}: claim.{option}")
        point = candidates[0]
        if len(candidates) > 1:
            point = best_on_validation(measured, candidates, classifier)
            chosen.append(point.name)
        return point.name, measured.draws(point, classifier, claim.measure)

    name, value = draws(claim.of, "of")
    entry: dict[str, Any] = {"classifier": classifier, "of": name, "value": interval(value)}
    if isinstance(claim.bound, int | float):
        entry["bound"] = float(claim.bound)
        difference = None if value is None else value - claim.bound
    else:
        entry["to"], to_value = draws(claim.bound, "above" if claim.below is None else "below")
        entry["to_value"] = interval(to_value)
        difference = _difference(value, to_value)
    entry["difference"] = interval(difference)
    entry["verdict"] = verdict(entry["difference"], above=claim.below is None)
    return entry | {"chosen": chosen}


def verdict(difference: Interval | None, *, above: bool) -> str:
    """``yes`` or ``no`` where the whole interval of a difference is on one side of 0, else ``open``.

    Example:
        >>> verdict({"value": 0.02, "low": 0.01, "high": 0.03}, above=True)
        'yes'
    """
    if difference is None or difference["low"] <= 0 <= difference["high"]:
        return "open"
    return "yes" if (difference["low"] > 0) == above else "no"


def best_on_validation(measured: Measured, points: Sequence[Point], classifier: str) -> Point:
    """The point of the best mean AUROC on validation's OOD kinds, which test does not have; the first, without one."""

    def auroc(point: Point) -> float:
        draws = [measured.draws(point, classifier, f"{group} auroc", "validation") for group in ("near", "far")]
        values = [each[0] for each in draws if each is not None]
        return float(np.mean(values)) if values else -np.inf

    return max(points, key=auroc)


def is_row(point: Mapping[str, Any]) -> bool:
    """Whether a point of the results is a row of params.yaml."""
    return bool(point["line"] == ROWS)


def _difference(own: Draws | None, other: Draws | None) -> Draws | None:
    return None if own is None or other is None else own - other


def _rows(table: pd.DataFrame, group: str | None) -> NDArray[np.bool_]:
    if group is None:
        return np.ones(len(table), bool)
    column = "role" if group in ("ind", "near", "far") else "dataset"
    return (table[column] == group).to_numpy()


@lru_cache(maxsize=8)
def _weights(count: int, draws: int, seed: int) -> NDArray[np.float64]:
    return bootstrap_weights(np.random.default_rng(seed), count, draws)
