"""What a study measured: each point with 95 % intervals, paired differences, and whether the claim is borne out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffguard.metrics import METRICS, Resampled, bootstrap_weights, resample_scores
from diffguard.metrics import interval as bootstrap_interval
from diffguard.version import METHOD_VERSION, __version__
from tasks.calibrate import check_orders, conformal, share
from tasks.combine import evaluations, fitted, score_tables, with_combinations
from tasks.config.run import Run
from tasks.config.study import (
    DENOISER_GROUP,
    GROUP,
    OOD_METRICS,
    ROWS,
    SHARE_METRICS,
    Point,
    Selector,
    read_groups,
    select,
    split_measure,
    where,
)
from tasks.evaluate.stage import resampled
from tasks.score.plan import Tables, plan, read_items
from tasks.studies.denoisers import Costs, correct_as_classifier, costs
from tasks.studies.groups import named_groups, quantile_groups
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
            runs[key] = run, _tables(run)
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
        if group == DENOISER_GROUP:
            return self._denoiser_draws(run, metric, split)
        if metric == "promised":
            return np.full(1 + run.params.evaluate.draws, self._promised(point, classifier))
        if metric in OOD_METRICS:
            found = self._ood_draws(point, classifier, str(group), "auroc" if metric == "error" else metric, split)
            return 1 - found if found is not None and metric == "error" else found
        rows = _rows(by_seed[0], group or ("ind" if metric in SHARE_METRICS else None))
        if not rows.any():
            return None
        values = np.mean(
            [self._of_images(run, point, classifier, metric, seed, split) for seed in run.params.seeds], axis=0
        )[rows]
        weights = _weights(len(values), run.params.evaluate.draws, run.params.evaluate.seed)
        return None if np.isnan(values).any() else weights @ values / weights.sum(axis=1)

    def interval(self, point: Point, classifier: str, measure: str, draws: Draws | None) -> Interval | None:
        """A measure of a point on test with its 95 % interval; exact (Clopper and Pearson) where it is a share.

        Args:
            draws: see `draws`.
        """
        run, tables = self.runs[point.run]
        group, metric = split_measure(measure)
        if draws is None or metric not in SHARE_METRICS or len(run.params.seeds) > 1:
            return interval(draws)
        if group == DENOISER_GROUP:
            [values] = self._correct(run, "test") or [np.array([])]
        else:
            [seed] = run.params.seeds
            table = tables[classifier, point.row, seed]
            rows = _rows(table[table["split"] == "test"], group or "ind")
            values = self._of_images(run, point, classifier, metric, seed, "test")[rows]
        exact = share(values)
        return {key: float(exact[key]) for key in ("value", "low", "high")}

    def _promised(self, point: Point, classifier: str) -> float:
        """The rate of rejections that the calibration images promise, for InD images as they are."""
        run, tables = self.runs[point.run]
        rates = []
        for seed in run.params.seeds:
            table = tables[classifier, point.row, seed]
            predicted = table.loc[table["split"] == "calibration", "predicted"]
            rates.append(conformal(run, table).promised(predicted))
        return float(np.mean(rates))

    def _denoiser_draws(self, run: Run, metric: str, split: str) -> Draws | None:
        if metric in ("accuracy", "error"):
            correct = self._correct(run, split)
            if correct is None:
                return None
            values = np.mean(correct, axis=0)
            weights = _weights(len(values), run.params.evaluate.draws, run.params.evaluate.seed)
            accuracy: Draws = weights @ values / weights.sum(axis=1)
            return 1 - accuracy if metric == "error" else accuracy
        if run.name not in self._costs:
            self._costs[run.name] = costs(run)
        value = float(getattr(self._costs[run.name], metric))
        return None if np.isnan(value) else np.full(1 + run.params.evaluate.draws, value)

    def _correct(self, run: Run, split: str) -> list[NDArray[np.float64]] | None:
        key = run.name, split
        if key not in self._corrects:
            self._corrects[key] = correct_as_classifier(run, split)
        return self._corrects[key]

    @cached_property
    def _corrects(self) -> dict[tuple[str, str], list[NDArray[np.float64]] | None]:
        return {}

    @cached_property
    def _costs(self) -> dict[str, Costs]:
        return {}

    def _group_draws(self, point: Point, classifier: str, split: str) -> Resampled | None:
        """Against the OOD test images of the point's group."""
        run, tables = self.runs[point.run]
        if split != "test" or point.grouping is None:
            return None
        members = self._groups[point.grouping]
        ids = set(members.index[members == point.axes["group"]])
        by_seed = [tables[classifier, point.row, seed] for seed in run.params.seeds]
        by_seed = [table[table["split"] == "test"] for table in by_seed]
        return resample_scores(
            [table.loc[table["role"] == "ind", "score"].to_numpy() for table in by_seed],
            {GROUP: [table.loc[table["id"].isin(ids), "score"].to_numpy() for table in by_seed]},
            {},
            draws=run.params.evaluate.draws,
            seed=run.params.evaluate.seed,
            metrics=self._metrics,
        )

    @cached_property
    def _groups(self) -> dict[str, pd.Series]:
        """Of each grouping, the group of each OOD test image, by its id; rows are those of the first classifier."""
        run, tables = next(iter(self.runs.values()))
        groups = {}
        for by, grouping in (self.planned.study.groups or {}).items():
            rows = run.scored[(run.scored["split"] == "test") & (run.scored["role"] != "ind")]
            rows = rows if grouping.of == "all" else rows[rows["role"] == grouping.of]
            if grouping.row is not None:
                of_seeds = [tables[run.params.classifiers[0], grouping.row, seed] for seed in run.params.seeds]
                scores = pd.concat([table.set_index("id")["score"] for table in of_seeds], axis=1).mean(axis=1)
                groups[by] = quantile_groups(scores[rows["id"]], grouping.parts)
            elif grouping.file is not None:
                named = read_groups(grouping.file, where(self.planned.name))
                groups[by] = named_groups(rows, named, grouping.file)
            else:
                groups[by] = rows.set_index("id")["dataset"]
        return groups

    def _ood_draws(self, point: Point, classifier: str, group: str, metric: str, split: str) -> Draws | None:
        run, tables = self.runs[point.run]
        key = point, classifier, split, group == GROUP
        if key not in self._resampled:
            if group == GROUP:
                self._resampled[key] = self._group_draws(point, classifier, split)
            elif run.change is not None:
                self._resampled[key] = None  # its OOD images were not changed
            else:
                self._resampled[key] = resampled(run, tables, classifier, point.row, split, self._metrics)
        found = self._resampled[key]
        return None if found is None or group not in found.by_seed else found.draws(group, metric)

    @cached_property
    def _metrics(self) -> list[str]:
        asked = {split_measure(measure)[1] for measure in self.planned.study.measure}
        return [metric for metric in METRICS if metric == "auroc" or metric in asked]

    @cached_property
    def _resampled(self) -> dict[tuple[Point, str, str, bool], Resampled | None]:
        return {}

    def _of_images(
        self, run: Run, point: Point, classifier: str, metric: str, seed: int, split: str
    ) -> NDArray[np.float64]:
        whole = self.runs[point.run][1][classifier, point.row, seed]
        table = whole[whole["split"] == split]
        if metric == "score":
            return table["score"].to_numpy(float)
        if metric == "accuracy":
            return (table["predicted"] == table["label"]).to_numpy(float)
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
                    "row": point.row,
                    "axes": dict(point.axes),
                    "classifier": classifier,
                    "measures": {
                        measure: measured.interval(point, classifier, measure, draws[point.name, measure])
                        for measure in study.measure
                    },
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


def _tables(run: Run) -> Tables:
    """The score tables of a run's rows; of one with a change, with the unchanged run's in place of what it lacks."""
    if run.change is None:
        return score_tables(run, plan(run))
    changed, unchanged = read_items(plan(run)), read_items(plan(run.unchanged))
    joined = {}
    for key, table in unchanged.items():
        is_changed = (table["split"] == "test") & (table["role"] == "ind")
        joined[key] = pd.concat([table[~is_changed], changed[key]], ignore_index=True)
    return with_combinations(run, joined)


def interval(draws: Draws | None) -> Interval | None:
    """A measure with its 95 % interval; None: it is not known."""
    return None if draws is None else bootstrap_interval(draws)


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
        found += [(point, to) for to in points if _name_of_line(to) == _name_of_line(point) and to.axes == same]
    return found


def _name_of_line(point: Point) -> str:
    """A row of params.yaml is a line of its own."""
    return f"{ROWS}: {point.row}" if point.line == ROWS else point.line


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
