"""Rows that are made of other rows: score tables of combinations, from those that were scored."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffguard.detectors.combination import Combined, Cost, Members, Sides, fit_combination
from diffguard.engine import network_evaluations
from diffguard.settings import TrainedDenoiser
from tasks.config.run import Run
from tasks.score.plan import Item, Tables, read_items


def score_tables(run: Run, items: list[Item]) -> Tables:
    """The score tables of all rows, combinations included.

    A combination's table has the columns of the others; ``steps`` are those of all members that had to run. Its
    calibration rows are scored as if the others alone were there (leave-one-out), as a new image is.
    """
    return with_combinations(run, read_items(items))


def with_combinations(run: Run, tables: Tables) -> Tables:
    """These tables, of every row that is scored by itself, and those of the combinations."""
    combined_too = dict(tables)
    for name in run.params.combine:
        for classifier, seed in dict.fromkeys((classifier, seed) for classifier, _, seed in tables):
            combined = fitted(run, combined_too, classifier, name, seed)
            combined_too[classifier, name, seed] = _table(combined, combined_too, classifier, name, seed)
    return combined_too


def fitted(run: Run, tables: Tables, classifier: str, name: str, seed: int) -> Combined:
    """A combination, fitted on the calibration scores of its members, and on validation if it chooses there."""
    settings = run.params.combine[name]
    members = {member: tables[classifier, member, seed] for member in settings.of}
    calibration = _scores(members, lambda table: table["split"] == "calibration")
    if not settings.chooses:
        return fit_combination(settings, calibration)
    return fit_combination(settings, calibration, sides(members, "validation"), _cost(run, tables, classifier, seed))


def sides(members: Mapping[str, pd.DataFrame], split: str) -> Sides:
    """From tables of the same images, by row: the scores of a split, its InD images and each OOD role apart."""

    def of(role: str) -> Members:
        return _scores(members, lambda table: (table["split"] == split) & (table["role"] == role))

    # A split need not have OOD images of every role.
    ood = {role: of(role) for role in ("near", "far")}
    return of("ind"), {role: scores for role, scores in ood.items() if all(map(len, scores.values()))}


def scored_members(run: Run, name: str) -> list[str]:
    """The rows that are scored by themselves which a row is made of, candidates included; itself, if it is one."""
    if name not in run.params.combine:
        return [name]
    names = [scored for member in run.params.combine[name].of for scored in scored_members(run, member)]
    return list(dict.fromkeys(names))


def diffused(run: Run, tables: Tables, classifier: str, name: str, split: str) -> dict[str, dict[str, float | None]]:
    """How much of each dataset a cascade's gate leaves to its second detector, and what that costs.

    Returns:
        {dataset: {"share", "evaluations"}}, means over the training seeds: the share of its images that go on, and
        network evaluations an image of the dataset, those of the others being none; None where it is not known how
        often the second detector evaluates the network.
    """
    gate, second = run.params.combine[name].of
    shares: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for seed in run.params.seeds:
        of_gate, of_second = (
            table[table["split"] == split] for table in (tables[classifier, row, seed] for row in (gate, second))
        )
        goes_on = fitted(run, tables, classifier, name, seed).needed(
            second, {gate: of_gate["score"].to_numpy()}, len(of_gate)
        )
        cost = evaluations(run, second, of_second["steps"]) * goes_on
        for dataset in of_gate["dataset"].unique():
            is_of_dataset = (of_gate["dataset"] == dataset).to_numpy()
            shares.setdefault(str(dataset), []).append(float(goes_on[is_of_dataset].mean()))
            costs.setdefault(str(dataset), []).append(float(cost[is_of_dataset].mean()))
    means = {dataset: (float(np.mean(shares[dataset])), float(np.mean(costs[dataset]))) for dataset in shares}
    return {
        dataset: {"share": share, "evaluations": None if np.isnan(cost) else cost}
        for dataset, (share, cost) in means.items()
    }


def evaluations(run: Run, name: str, steps: pd.Series, members: Sequence[str] | None = None) -> NDArray[np.float64]:
    """How often each image, whose inversion took so many steps, evaluates the network for a row; NaN: not known.

    Of several variants it is not, since they share their work, nor of a denoiser that this project has not trained.

    Args:
        members: of a combination that has chosen among its rows, those.
    """
    variants = _variants(run, [name] if members is None else members)
    if not variants:
        return np.zeros(len(steps))
    if len(variants) > 1 or not isinstance(run.benchmark.denoiser, TrainedDenoiser):
        return np.full(len(steps), np.nan)
    return _evaluations(run, variants[0], steps)


def _cost(run: Run, tables: Tables, classifier: str, seed: int) -> Cost:
    """Network evaluations of a validation image for several rows, as if each of their variants worked for itself."""

    def cost(names: Sequence[str]) -> float:
        validation = {
            name: table.loc[table["split"] == "validation", "steps"]
            for name in _variants(run, names)
            for table in [tables[classifier, name, seed]]
        }
        return sum(float(_evaluations(run, name, steps).mean()) for name, steps in validation.items())

    return cost


def _variants(run: Run, names: Sequence[str]) -> list[str]:
    """The variants that rows are made of, each once."""
    members = dict.fromkeys(member for name in names for member in scored_members(run, name))
    return [member for member in members if member in run.params.score.variants]


def _evaluations(run: Run, variant: str, steps: pd.Series) -> NDArray[np.float64]:
    """Of one variant; a denoiser that this project has not trained is taken for one of 1,000 steps."""
    denoiser, settings = run.benchmark.denoiser, run.params.score.variants[variant]
    train_steps = denoiser.train_steps if isinstance(denoiser, TrainedDenoiser) else 1000
    cost = {
        int(level): network_evaluations(settings, int(level), train_steps, len(run.classes), null_label=True)
        for level in steps.unique()
        if level > 0 or settings.is_single_step
    }
    return np.array([float(cost.get(int(level), 0)) for level in steps])


def _table(combined: Combined, tables: Tables, classifier: str, name: str, seed: int) -> pd.DataFrame:
    members = {member: tables[classifier, member, seed] for member in combined.members}
    member_scores = {member: table["score"].to_numpy() for member, table in members.items()}
    first = members[combined.members[0]]
    scores = combined.score(member_scores)
    is_calibration = (first["split"] == "calibration").to_numpy()
    scores[is_calibration] = combined.score_calibration()
    steps = sum(
        table["steps"].where(combined.needed(member, member_scores, len(table)), 0) for member, table in members.items()
    )
    return first.assign(score=scores, variant=name, steps=steps)


def _scores(members: Mapping[str, pd.DataFrame], rows: Callable[[pd.DataFrame], pd.Series]) -> Members:
    return {name: table.loc[rows(table), "score"].to_numpy() for name, table in members.items()}
