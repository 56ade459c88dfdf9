"""Stage log: one parent run an evaluation, one child run a row of its table, in MLflow."""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diffguard.metrics import METRICS
from diffguard.settings import Variant
from diffguard.utils.hashing import hash_values
from tasks.calibrate import conformal
from tasks.combine import Tables, score_tables
from tasks.common.console import run_stage
from tasks.common.files import read_json, write_json
from tasks.config.run import Run, open_run
from tasks.evaluate.cost import evaluations_per_image
from tasks.evaluate.pictures import auroc_by_cost, curves, of_dataset, sample_grid
from tasks.evaluate.report import report
from tasks.evaluate.stage import Metrics
from tasks.prepare.fairness import dataset_warnings
from tasks.score.plan import Item, plan
from tasks.services.tracking import (
    EXPERIMENT,
    Linked,
    dvc_hash,
    experiment_id,
    flat,
    log_batch,
    logged_run,
    open_tracking,
    run_tags,
    with_interval,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset

NOTE_FILE = "logged.json"
"""Of what was logged, and as which run: DVC's output of this stage."""


def log(run: Run, items: list[Item], metrics: Metrics, thresholds: dict[str, Any]) -> str:
    """Log an evaluation.

    Returns:
        The id of the parent run.
    """
    client = open_tracking()
    experiment = experiment_id(client)
    name = run.benchmark.name if run.own else f"{run.benchmark.name} ({run.name})"
    if experiment_of_dvc := os.environ.get("DVC_EXP_NAME"):
        name = f"{name} · {experiment_of_dvc}"
    tags = run_tags(run)
    # Read before: a file of scores that cannot be read is no fault of MLflow's.
    tables, datasets = score_tables(run, items), _datasets(run)
    costs = {classifier: _costs(run, tables, classifier, rows) for classifier, rows in metrics.items()}
    with logged_run(client, experiment, name, tags) as parent:
        _log_parent(client, parent, run, metrics, costs)
        _log_datasets(client, parent, datasets)
        for classifier, rows in metrics.items():
            for row, found in rows.items():
                described = Row(classifier, row, found, thresholds[classifier][row], costs[classifier][row])
                with logged_run(client, experiment, described.title, {**tags, "mlflow.parentRunId": parent}) as child:
                    _log_datasets(client, child, datasets)
                    its_own = [item for item in items if (item.classifier, item.name) == (classifier, row)]
                    _log_child(client, experiment, child, run, described, its_own, tables, datasets)
    if run.own:
        write_json(run.results / NOTE_FILE, {"experiment": EXPERIMENT, "run": parent})
    return parent


def main() -> None:
    run = open_run()
    items, made = plan(run), "run: dvc repro"
    metrics = read_json(run.results / "metrics.json", made)
    thresholds = read_json(run.results / "calibration.json", made)
    print(f"logged to MLflow as run {log(run, items, metrics, thresholds)}")


@dataclass(frozen=True)
class Row:
    """A row of the result table, and what was found of it.

    Attributes:
        metrics: see `tasks.evaluate.report.Metrics`.
        thresholds: of each training seed; see `tasks.calibrate`.
        evaluations: of the network per test image; None: not known.
    """

    classifier: str
    name: str
    metrics: dict[str, Any]
    thresholds: list[dict[str, Any]]
    evaluations: float | None

    @property
    def title(self) -> str:
        return f"{self.name} · {self.classifier}"


def _costs(run: Run, tables: Tables, classifier: str, metrics: dict[str, Any]) -> dict[str, float | None]:
    """Network evaluations per test image of each row under a classifier."""
    test = {
        name: table[table["split"] == "test"]
        for (of, name, seed), table in tables.items()
        if (of, seed) == (classifier, run.params.seeds[0])
    }
    steps = {name: table["steps"] for name, table in test.items()}
    return {name: evaluations_per_image(run, name, found, steps, test[name]) for name, found in metrics.items()}


def _log_parent(
    client: "MlflowClient", parent: str, run: Run, metrics: Metrics, costs: Mapping[str, Mapping[str, float | None]]
) -> None:
    params = {"benchmark": run.benchmark.name, "limit": run.limit, "classifiers": run.params.classifiers}
    models = run.benchmark.model_dump(mode="json", include={"classifiers", "denoiser"}, exclude_none=True)
    training = flat({**models, "seeds": run.params.seeds})
    log_batch(client, parent, flat(params) | training, {})
    headline = {
        f"{classifier}/{group}_{metric}": rows[run.default][group][metric]["value"]
        for classifier, rows in metrics.items()
        for group in ("near", "far")
        if group in rows[run.default]
        for metric in ("auroc", "fpr95")
    }
    log_batch(client, parent, {}, headline)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "results.md").write_text(report(metrics, dataset_warnings(run)) + "\n", encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        auroc_by_cost(metrics, costs, run.benchmark.name, folder / "auroc-by-evaluations.png")
        client.log_artifacts(parent, str(folder))
    docs = run.other / "docs"
    if docs.is_dir():
        client.log_artifacts(parent, str(docs), "data-docs")


def _log_child(
    client: "MlflowClient",
    experiment: str,
    child: str,
    run: Run,
    row: Row,
    items: list[Item],
    tables: Tables,
    datasets: "Datasets",
) -> None:
    """A row of the table; of a combination there are no items.

    The run gets the metrics that rows are compared by; all others are in its metrics.json. Those of near- and far-OOD
    are linked to the benchmark, a dataset's own to that dataset, and all of them to a logged model of the row, so that
    MLflow's search ranks the rows by any dataset.
    """
    table, threshold = tables[row.classifier, row.name, run.params.seeds[0]], row.thresholds[0]["threshold_together"]
    test = table[table["split"] == "test"]
    ind = test[test["role"] == "ind"]
    settings = items[0].settings if items else run.params.combine[row.name]
    kind = type(settings).__name__.lower()
    params = {
        "detector": row.name,
        "kind": kind,
        "classifier": row.classifier,
        "benchmark": run.benchmark.name,
        "limit": run.limit,
        "seeds": run.params.seeds,
        # MLflow's comparison shows parameters by the alphabet: what tells rows apart comes before their settings.
        "settings": settings.model_dump(mode="json", exclude_none=kind == "combination"),
    }
    if isinstance(settings, Variant):
        params["distance"] = settings.distance
    if "fitted" in row.metrics:
        params["fitted"] = row.metrics["fitted"][0]  # of the seed that is bundled
    costs = {} if row.evaluations is None else {"evaluations_per_image": row.evaluations}
    if items:
        folder = items[0].folder
        params["score_folder"] = folder.path.name
        params["made_by"] = {key: value for key, value in folder.made_by.items() if not isinstance(value, dict)}
        costs["images_per_second"] = len(table) / max(folder.seconds(), 1e-9)
    others = {
        **costs,
        **with_interval("rejected", row.thresholds[0]["rejected"]),
        "promised": row.thresholds[0]["promised"],
        "accuracy": float((ind["label"] == ind["predicted"]).mean()),
        "threshold": threshold,
    }
    if accuracy := row.metrics.get("denoiser", {}).get("accuracy"):
        others |= with_interval("denoiser/accuracy", accuracy)
    names = flat(params)
    compared = {"detector", "kind", "classifier", "benchmark", "distance"}
    model = client.create_logged_model(
        experiment,
        name=_model_name(row.title),
        source_run_id=child,
        params={key: value for key, value in names.items() if key in compared or key.startswith("settings.")},
        model_type="diffguard row",
    )
    _log_outputs(client, child, model.model_id)
    of_groups = _group_metrics(row.metrics)
    aurocs = {f"{name}/auroc": row.metrics[name]["auroc"]["value"] for name in datasets.ood}
    linked = dict.fromkeys(of_groups, Linked(datasets.benchmark, model.model_id))
    linked |= {f"{name}/auroc": Linked(dataset, model.model_id) for name, dataset in datasets.ood.items()}
    # MLflow's comparison opens on the first metric that was logged.
    log_batch(client, child, names, {**of_groups, **aurocs, **others}, linked)
    client.finalize_logged_model(model.model_id, "READY")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        steps = {str(dataset): float(rows["steps"].mean()) for dataset, rows in test.groupby("dataset")}
        write_json(path / "metrics.json", {"metrics": row.metrics, "thresholds": row.thresholds, "mean_steps": steps})
        for seed in run.params.seeds:
            tables[row.classifier, row.name, seed].to_csv(path / f"scores-seed-{seed}.csv", index=False)
        curves(test, threshold, row.title, path / "curves.png")
        if items and (samples := items[0].folder.samples()):
            (path / "samples").mkdir()
            decision = conformal(run, table)
            for dataset, rows in test.groupby("dataset"):
                chosen = of_dataset(samples, set(rows["id"]))
                sample_grid(chosen, rows, run.classes, decision).save(path / "samples" / f"{dataset}.png")
        client.log_artifacts(child, str(path))


def _group_metrics(found: dict[str, Any]) -> dict[str, float]:
    """Those of near- and far-OOD, with their intervals."""
    values: dict[str, float] = {}
    for group in (each for each in ("near", "far") if each in found):
        for metric in METRICS:
            values |= with_interval(f"{group}/{metric}", found[group][metric])
    return values


def _log_outputs(client: "MlflowClient", run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _model_name(title: str) -> str:
    """A title without what MLflow allows in no model's name."""
    return re.sub(r"[/:.%\"']", "_", title)


@dataclass(frozen=True)
class Datasets:
    """The benchmark, and each OOD dataset of its test split by name, as MLflow knows them."""

    benchmark: "Dataset"
    ood: Mapping[str, "Dataset"]


def _datasets(run: Run) -> Datasets:
    import mlflow.data

    def dataset(name: str, table: pd.DataFrame, digest: str) -> "Dataset":
        source = str(run.home / "manifest.parquet")
        return mlflow.data.from_pandas(
            table, source=source, name=name, digest=digest, targets="label"
        )._to_mlflow_entity()

    manifest = run.manifest.drop(columns="path")
    ood = run.scored[(run.scored["split"] == "test") & (run.scored["role"] != "ind")]
    return Datasets(
        dataset(run.benchmark.name, manifest, dvc_hash(run, "manifest.parquet") or run.name),
        {
            str(name): dataset(str(name), rows.drop(columns="path"), hash_values(rows["content_hash"].tolist())[:32])
            for name, rows in ood.groupby("dataset")
        },
    )


def _log_datasets(client: "MlflowClient", run_id: str, datasets: Datasets) -> None:
    from mlflow.entities import DatasetInput, InputTag

    tag = InputTag("mlflow.data.context", "evaluation")
    inputs = [DatasetInput(dataset, [tag]) for dataset in (datasets.benchmark, *datasets.ood.values())]
    client.log_inputs(run_id, datasets=inputs)


if __name__ == "__main__":
    run_stage(main)
