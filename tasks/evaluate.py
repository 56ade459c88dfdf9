"""Stage evaluate: metrics with intervals, and the curves for DVC's plots."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from diffguard.calibration import accept_threshold
from diffguard.metrics import evaluate_scores
from tasks.command import run_stage
from tasks.files import write_json, write_whole
from tasks.pictures import of_dataset, sample_grid
from tasks.run import Run, open_run
from tasks.score import Item, plan

Metrics = dict[str, dict[str, dict[str, Any]]]
"""{classifier: {variant: {dataset or "near" or "far": metrics}}}"""


def evaluate(run: Run, items: list[Item]) -> Metrics:
    """Write metrics.json (test), validation.json (the same on the validation split) and plots/.

    Returns:
        The metrics on test.
    """
    tables = {(item.classifier, item.name, item.seed): item.folder.read() for item in items}
    metrics = {split: _metrics(run, tables, split) for split in ("test", "validation")}
    _write_plots(run, tables)
    _write_picture(run, items)
    write_json(run.results / "summary.json", summary(metrics["test"], _default(run)))
    write_json(run.results / "validation.json", metrics["validation"])
    write_json(run.results / "metrics.json", metrics["test"])
    return metrics["test"]


def _metrics(run: Run, tables: dict[tuple[str, str, int], pd.DataFrame], split: str) -> Metrics:
    found: Metrics = {}
    for classifier in run.params.classifiers:
        found[classifier] = {}
        for name in run.params.score.names:
            each = [tables[classifier, name, seed] for seed in run.params.seeds]
            each = [table[table["split"] == split] for table in each]
            roles = each[0][["dataset", "role"]].drop_duplicates()
            groups = {role: roles.loc[roles["role"] == role, "dataset"].tolist() for role in ("near", "far")}
            datasets = [*groups["near"], *groups["far"]]
            if not datasets or "ind" not in set(roles["role"]):
                found[classifier][name] = {}  # a benchmark need not have a validation split
                continue
            ood = {dataset: [_scores(table, "dataset", dataset) for table in each] for dataset in datasets}
            found[classifier][name] = evaluate_scores(
                [_scores(table, "role", "ind") for table in each],
                ood,
                groups,
                draws=run.params.evaluate.draws,
                seed=run.params.evaluate.seed,
            )
    return found


def _scores(table: pd.DataFrame, column: str, value: str) -> np.ndarray[Any, Any]:
    return table.loc[table[column] == value, "score"].to_numpy()


def _write_plots(run: Run, tables: dict[tuple[str, str, int], pd.DataFrame]) -> None:
    """CSV files that `dvc plots show` draws: ROC against near-OOD, and the default's scores; a line a file."""
    folder, seed = run.results / "plots", run.params.seeds[0]
    shutil.rmtree(folder, ignore_errors=True)
    for (classifier, name, at), table in tables.items():
        if at == seed:
            test = table[(table["split"] == "test") & table["role"].isin(["ind", "near"])]
            fpr, tpr, _ = roc_curve(test["role"] == "ind", -test["score"])
            _write_csv(folder / "roc" / f"{classifier}-{name}.csv", pd.DataFrame({"fpr": fpr, "tpr": tpr}))
    default = tables[run.params.classifiers[0], _default(run), seed]
    for dataset, rows in default[default["split"] == "test"].groupby("dataset"):
        scores = rows["score"].sort_values().to_numpy()
        share = np.arange(1, len(scores) + 1) / len(scores)
        _write_csv(folder / "scores" / f"{dataset}.csv", pd.DataFrame({"score": scores, "share": share}))


def _write_picture(run: Run, items: list[Item]) -> None:
    """verdicts.png: two images of each test dataset under the default detector, as the README shows it."""
    wanted = (run.params.classifiers[0], _default(run), run.params.seeds[0])
    [item] = [each for each in items if (each.classifier, each.name, each.seed) == wanted]
    samples, table = item.folder.samples(), item.folder.read()
    if samples is None:
        return
    kept = table[table["id"].isin(samples.ids)]
    ids = set(kept.groupby("dataset").tail(2)["id"])
    threshold = accept_threshold(table.loc[table["split"] == "calibration", "score"], run.params.calibrate.accept)
    picture = sample_grid(of_dataset(samples, ids), table, run.classes, threshold)
    write_whole(run.results / "verdicts.png", lambda target: picture.save(target))


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda target: table.to_csv(target, index=False))


def _default(run: Run) -> str:
    """The default detector, or the first of a run that leaves it out."""
    names = run.params.score.names
    return run.params.evaluate.default if run.params.evaluate.default in names else names[0]


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


def result_table(metrics: Metrics) -> str:
    """AUROC and FPR@95 in percent, with 95 % intervals, as a Markdown table."""
    lines = [
        "| classifier | detector | near AUROC | near FPR@95 | far AUROC | far FPR@95 |",
        "|---|---|---|---|---|---|",
    ]
    for classifier, rows in metrics.items():
        for name, row in rows.items():
            cells = [
                _cell(row.get(group, {}).get(metric)) for group in ("near", "far") for metric in ("auroc", "fpr95")
            ]
            lines.append(f"| {classifier} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: dict[str, float] | None) -> str:
    if metric is None:
        return "–"
    return f"{100 * metric['value']:.1f} ({100 * metric['low']:.1f}–{100 * metric['high']:.1f})"


def main() -> None:
    run = open_run()
    print(result_table(evaluate(run, plan(run))))


if __name__ == "__main__":
    run_stage(main)
