"""Stage log: one parent run an evaluation, one child run a row of its table, in MLflow."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.calibrate import conformal
from tasks.combine import Tables, score_tables
from tasks.common.console import run_stage
from tasks.common.files import read_json, write_json
from tasks.config.run import Run, open_run
from tasks.evaluate.pictures import curves, of_dataset, sample_grid
from tasks.evaluate.report import report
from tasks.evaluate.stage import Metrics
from tasks.prepare.fairness import dataset_warnings
from tasks.score.plan import Item, plan

if TYPE_CHECKING:
    from mlflow import MlflowClient

from tasks.services.tracking import EXPERIMENT, dvc_hash, experiment_id, flat, log_batch, open_tracking, run_tags

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
    parent = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    tags, children = {**tags, "mlflow.parentRunId": parent}, list[str]()
    try:
        tables = score_tables(run, items)
        _log_parent(client, parent, run, metrics)
        dataset = _dataset(run)
        _log_dataset(client, parent, dataset)
        for classifier, rows in metrics.items():
            for row, found in rows.items():
                child = client.create_run(experiment, run_name=f"{row} · {classifier}", tags=tags).info.run_id
                children.append(child)
                mine = [item for item in items if (item.classifier, item.name) == (classifier, row)]
                _log_child(client, child, run, (classifier, row), mine, tables, found, thresholds[classifier][row])
                _log_dataset(client, child, dataset)
                client.set_terminated(child, "FINISHED")
        client.set_terminated(parent, "FINISHED")
    except BaseException:
        for each in (*children[-1:], parent):
            client.set_terminated(each, "FAILED")
        raise
    if run.own:
        write_json(run.results / NOTE_FILE, {"experiment": EXPERIMENT, "run": parent})
    return str(parent)


def main() -> None:
    run = open_run()
    items, made = plan(run), "run: dvc repro"
    metrics = read_json(run.results / "metrics.json", made)
    thresholds = read_json(run.results / "calibration.json", made)
    print(f"logged to MLflow as run {log(run, items, metrics, thresholds)}")


def _log_parent(client: "MlflowClient", parent: str, run: Run, metrics: Metrics) -> None:
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
        client.log_artifacts(parent, str(folder))
    docs = run.other / "docs"
    if docs.is_dir():
        client.log_artifacts(parent, str(docs), "data-docs")


def _log_child(
    client: "MlflowClient",
    child: str,
    run: Run,
    row: tuple[str, str],
    items: list[Item],
    tables: Tables,
    found: dict[str, Any],
    thresholds: list[dict[str, Any]],
) -> None:
    """A row of the table, (classifier, name); of a combination there are no items."""
    classifier, name = row
    table, threshold = tables[classifier, name, run.params.seeds[0]], thresholds[0]["threshold_together"]
    test = table[table["split"] == "test"]
    ind = test[test["role"] == "ind"]
    settings = items[0].settings if items else run.params.combine[name]
    kind = type(settings).__name__.lower()
    params = {
        "detector": name,
        "kind": kind,
        "classifier": classifier,
        "benchmark": run.benchmark.name,
        "limit": run.limit,
        "seeds": run.params.seeds,
        kind: settings.model_dump(mode="json", exclude_none=kind == "combination"),
    }
    if "fitted" in found:
        params["fitted"] = found["fitted"][0]  # of the seed that is bundled
    metrics = _row_metrics(found)
    metrics["accuracy"] = float((ind["label"] == ind["predicted"]).mean())
    metrics["threshold"] = threshold
    metrics |= _metric_values({key: thresholds[0][key] for key in ("rejected", "rejected_together")})
    metrics |= {key: thresholds[0][key] for key in ("promised", "promised_together")}
    metrics |= {f"accepted/{dataset}": each["value"] for dataset, each in thresholds[0]["accepted"].items()}
    if kind in ("variant", "combination"):
        metrics |= {f"steps/{dataset}": float(rows["steps"].mean()) for dataset, rows in test.groupby("dataset")}
    if items:
        folder = items[0].folder
        params["score_folder"] = folder.path.name
        params["made_by"] = {key: value for key, value in folder.made_by.items() if not isinstance(value, dict)}
        metrics["images_per_second"] = len(table) / max(folder.seconds(), 1e-9)
    log_batch(client, child, flat(params), metrics)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        for seed in run.params.seeds:
            tables[classifier, name, seed].to_csv(path / f"scores-seed-{seed}.csv", index=False)
        curves(test, threshold, f"{name} · {classifier}", path / "curves.png")
        if items and (samples := items[0].folder.samples()):
            (path / "samples").mkdir()
            decision = conformal(run, table)
            for dataset, rows in test.groupby("dataset"):
                chosen = of_dataset(samples, set(rows["id"]))
                sample_grid(chosen, rows, run.classes, decision).save(path / "samples" / f"{dataset}.png")
        client.log_artifacts(child, str(path))


def _row_metrics(found: dict[str, Any]) -> dict[str, float]:
    """The figures of a row by names that MLflow takes, near and far first."""
    groups = [each for each in found if each not in ("difference", "diffused", "fitted")]
    groups.sort(key=lambda group: group not in ("near", "far"))
    metrics = {f"{group}/{name}": value for group in groups for name, value in _metric_values(found[group]).items()}
    for member, differences in found.get("difference", {}).items():
        for group, values in differences.items():
            place = f"difference/{member}/{group}"
            metrics |= {f"{place}/{name}": value for name, value in _metric_values(values).items()}
    for dataset, each in found.get("diffused", {}).items():
        metrics |= {f"diffused/{dataset}/{key}": value for key, value in each.items() if value is not None}
    return metrics


def _metric_values(row: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            values |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
    return values


def _dataset(run: Run) -> Any:
    import mlflow.data

    manifest = run.manifest.drop(columns="path")
    digest = dvc_hash(run, "manifest.parquet") or run.name
    source = str(run.home / "manifest.parquet")
    return mlflow.data.from_pandas(manifest, source=source, name=run.benchmark.name, digest=digest, targets="label")


def _log_dataset(client: "MlflowClient", run_id: str, dataset: Any) -> None:
    from mlflow.entities import DatasetInput, InputTag

    tag = InputTag("mlflow.data.context", "evaluation")
    client.log_inputs(run_id, datasets=[DatasetInput(dataset._to_mlflow_entity(), [tag])])


if __name__ == "__main__":
    run_stage(main)
