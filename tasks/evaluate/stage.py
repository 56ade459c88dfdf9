"""Stage evaluate: metrics with intervals, and the curves for DVC's plots."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from diffguard.metrics import METRICS, Resampled, resample_scores
from tasks.calibrate import check_orders, conformal, share
from tasks.combine import Tables, diffused, fitted, score_tables, scored_members
from tasks.common.files import write_json, write_whole
from tasks.config.run import Run, open_run
from tasks.evaluate.pictures import of_dataset, sample_grid
from tasks.evaluate.report import Metrics, report
from tasks.prepare.fairness import dataset_warnings
from tasks.score.plan import Item, plan

Chosen = dict[tuple[str, str], list[dict[str, Any]]]
"""By classifier and row, what a combination that chooses on validation has chosen, of each training seed."""


def evaluate(run: Run, items: list[Item]) -> Metrics:
    """Write metrics.json (test), validation.json (the same on the validation split), what DVC compares, and plots/.

    Returns:
        The metrics on test.
    """
    tables = score_tables(run, items)
    check_orders(run, tables)
    chosen = _chosen(run, tables)
    metrics = {split: _metrics(run, tables, split, chosen) for split in ("test", "validation")}
    _write_plots(run, tables)
    _write_picture(run, items, tables)
    write_json(run.results / "summary.json", summary(metrics["test"], run.default))
    write_json(run.results / "rows.json", rows(metrics["test"]))
    write_json(run.results / "validation.json", metrics["validation"])
    write_json(run.results / "metrics.json", metrics["test"])
    return metrics["test"]


def _chosen(run: Run, tables: Tables) -> Chosen:
    return {
        (classifier, name): [fitted(run, tables, classifier, name, seed).fitted_values() for seed in run.params.seeds]
        for classifier in run.params.classifiers
        for name, combination in run.params.combine.items()
        if combination.chooses
    }


def _metrics(run: Run, tables: Tables, split: str, chosen: Chosen) -> Metrics:
    metrics: Metrics = {}
    for classifier in run.params.classifiers:
        draws = {name: resampled(run, tables, classifier, name, split) for name in run.params.names}
        metrics[classifier] = {name: {} if row is None else row.summary() for name, row in draws.items()}
        for name in run.params.score.variants:
            if accuracy := denoiser_accuracy(run, tables, classifier, name, split):
                metrics[classifier][name]["denoiser"] = {"accuracy": accuracy}
        for name, combination in run.params.combine.items():
            combined, row = draws[name], metrics[classifier][name]
            if combined is None:
                continue
            members = {member: draws[member] for member in combination.of}
            row["difference"] = {name: combined.difference(one) for name, one in members.items() if one is not None}
            if combination.is_gated:
                row["diffused"] = diffused(run, tables, classifier, name, split)
            if combination.chooses:
                row["fitted"] = chosen[classifier, name]
    return metrics


def resampled(
    run: Run, tables: Tables, classifier: str, name: str, split: str, metrics: Sequence[str] = METRICS
) -> Resampled | None:
    """Metrics of a row on draws of the images, the same for every row; None of a split without InD or OOD images."""
    by_seed = [tables[classifier, name, seed] for seed in run.params.seeds]
    by_seed = [table[table["split"] == split] for table in by_seed]
    roles = by_seed[0][["dataset", "role"]].drop_duplicates()
    groups = {role: roles.loc[roles["role"] == role, "dataset"].tolist() for role in ("near", "far")}
    datasets = [*groups["near"], *groups["far"]]
    if not datasets or "ind" not in set(roles["role"]):
        return None  # a benchmark need not have a validation split
    return resample_scores(
        [_scores(table, "role", "ind") for table in by_seed],
        {dataset: [_scores(table, "dataset", dataset) for table in by_seed] for dataset in datasets},
        groups,
        draws=run.params.evaluate.draws,
        seed=run.params.evaluate.seed,
        metrics=metrics,
    )


def denoiser_accuracy(
    run: Run, tables: Tables, classifier: str, name: str, split: str
) -> dict[str, float | int] | None:
    """How many InD images of a split the denoiser, as a classifier, gives their label.

    Returns:
        See `tasks.calibrate.share`, over all training seeds; None: the row is none that asks the denoiser, or the split
        has no InD images.
    """
    right = []
    for seed in run.params.seeds:
        table = tables[classifier, name, seed]
        if "denoiser_label" in table:
            ind = table[(table["split"] == split) & (table["role"] == "ind")]
            right += (ind["denoiser_label"] == ind["label"]).tolist()
    if not right:
        return None
    return share(right)


def _scores(table: pd.DataFrame, column: str, value: str) -> np.ndarray[Any, Any]:
    return table.loc[table[column] == value, "score"].to_numpy()


def _write_plots(run: Run, tables: Tables) -> None:
    """CSV files that `dvc plots show` draws: ROC against near-OOD, and the default's scores; a line a file."""
    folder, seed = run.results / "plots", run.params.seeds[0]
    shutil.rmtree(folder, ignore_errors=True)
    for (classifier, name, table_seed), table in tables.items():
        if table_seed == seed:
            test = table[(table["split"] == "test") & table["role"].isin(["ind", "near"])]
            fpr, tpr, _ = roc_curve(test["role"] == "ind", -test["score"])
            _write_csv(folder / "roc" / f"{classifier}-{name}.csv", pd.DataFrame({"fpr": fpr, "tpr": tpr}))
    default = tables[run.params.classifiers[0], run.default, seed]
    for dataset, rows in default[default["split"] == "test"].groupby("dataset"):
        scores = rows["score"].sort_values().to_numpy()
        share = np.arange(1, len(scores) + 1) / len(scores)
        _write_csv(folder / "scores" / f"{dataset}.csv", pd.DataFrame({"score": scores, "share": share}))


def _write_picture(run: Run, items: list[Item], tables: Tables) -> None:
    """verdicts.png: two images of each test dataset under the default detector.

    Of a combination they are the pictures of the first of its members that has some, under its own verdicts.
    """
    classifier, seed = run.params.classifiers[0], run.params.seeds[0]
    folders = {(item.classifier, item.name, item.seed): item.folder for item in items}
    samples = None
    for name in scored_members(run, run.default):
        samples = samples or folders[classifier, name, seed].samples()
    if samples is None:
        return
    table = tables[classifier, run.default, seed]
    kept = table[table["id"].isin(samples.ids)]
    ids = set(kept.groupby("dataset").tail(2)["id"])
    picture = sample_grid(of_dataset(samples, ids), table, run.classes, conformal(run, table))
    write_whole(run.results / "verdicts.png", lambda target: picture.save(target))


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda target: table.to_csv(target, index=False))


def summary(metrics: Metrics, detector: str) -> dict[str, dict[str, float]]:
    """The headline figures of one detector, for each classifier."""
    return {
        classifier: {
            f"{group} {metric}": rows[detector][group][metric]["value"]
            for group in ("near", "far")
            if group in rows[detector]
            for metric in ("auroc", "fpr95")
        }
        for classifier, rows in metrics.items()
    }


def rows(metrics: Metrics) -> dict[str, dict[str, dict[str, float]]]:
    """The headline figures of every row, in percent, for `dvc metrics diff`."""
    return {
        classifier: {
            name: {key: round(100 * value, 2) for key, value in summary(metrics, name)[classifier].items()}
            for name in rows
        }
        for classifier, rows in metrics.items()
    }


def main() -> None:
    run = open_run()
    print(report(evaluate(run, plan(run)), dataset_warnings(run)))
