"""A study to MLflow: one parent run, and a child run a point with its axes' values as params."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.config.study import ROWS
from tasks.services.tracking import (
    NOTE_TAG,
    STUDIES,
    experiment_id,
    flat,
    log_batch,
    logged_run,
    open_tracking,
    run_tags,
    with_interval,
)
from tasks.studies.page import conclusion, table
from tasks.studies.points import Planned


def log(planned: Planned, results: Mapping[str, Any], folder: Path) -> str:
    """Log a study.

    Args:
        folder: of its results, whose files are the parent's artifacts.

    Returns:
        The id of the parent run.
    """
    client = open_tracking()
    experiment = experiment_id(client, STUDIES)
    run = planned.open(planned.points[0].run)
    tags = {
        **run_tags(run),
        "mlflow.source.name": "flows/study.py",
        "study": planned.name,
        "benchmark": planned.benchmark,
    }
    said = f"{conclusion(planned.study, results)}\n\n{table(planned.study, results)}"
    name = f"{planned.name} ({planned.benchmark})"
    with logged_run(client, experiment, name, {**tags, NOTE_TAG: said}) as parent:
        settings = {"study": planned.name, "benchmark": planned.benchmark, "limit": results["limit"]}
        settings |= {"classifiers": results["classifiers"], "seeds": results["seeds"], "points": len(planned.points)}
        found = results["claim"][0]
        metrics = {f"claim/{key}": value for key, value in (found["difference"] or {}).items()}
        log_batch(client, parent, flat(settings | {"claim.verdict": found["verdict"]}), metrics)
        rows = {point.name: point for point in planned.points}
        for point in results["points"]:
            title = f"{point['name']} · {point['classifier']}"
            params = {"study": planned.name, "benchmark": planned.benchmark, "point": point["name"]}
            params |= {"line": point["line"], "classifier": point["classifier"], **point["axes"]}
            # Beside the axes, so that MLflow's comparison finds each under its own name.
            of_run = planned.open(rows[point["name"]].run).params
            row = rows[point["name"]].row
            if point["line"] != ROWS:
                params["variant"] = of_run.score.variants[row].model_dump(mode="json")
            with logged_run(client, experiment, title, {**tags, "mlflow.parentRunId": parent}) as child:
                log_batch(client, child, flat(params), measured(point["measures"]))
        client.log_artifacts(parent, str(folder))
    return parent


def measured(measures: Mapping[str, Mapping[str, float] | None]) -> dict[str, float]:
    """Measures by names that MLflow takes, each with both ends of its interval; one that is not known is left out."""
    values: dict[str, float] = {}
    for measure, found in measures.items():
        if found is not None:
            values |= with_interval(measure.replace(" ", "/"), found)
    return values
