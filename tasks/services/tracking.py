"""MLflow's tracking store: opened, checked, and what every log writes."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffguard.errors import DataError, ServiceError
from diffguard.utils.hashing import hash_values
from diffguard.utils.text import first_line
from tasks.config import project
from tasks.config.run import Run
from tasks.services.moved import local_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset


EXPERIMENT, STUDIES = "diffguard", "diffguard-studies"

NOTES = {
    EXPERIMENT: """One run is an evaluation; its children are the rows of its table (tag `mlflow.parentRunId`).

To compare rows, select children and press *Compare*. Columns that matter: parameters `detector`, `classifier`,
`distance`; metrics `near/auroc` and `far/auroc` with `_low` and `_high` (95 % bootstrap interval; higher is better),
`near/fpr95` (lower is better), `evaluations_per_image` (network evaluations, the cost), `rejected` beside `promised`
(InD test images that are rejected, and the guaranteed share). All other figures are in `metrics.json` of each run,
a chart of near AUROC by cost is the evaluation's `auroc-by-evaluations.png`. Under *Models* the rows are ranked by
dataset: `<dataset>/auroc`.
""",
    STUDIES: """One run is a study of `data/studies/`, with its conclusion and table as description and its figures as
artifacts; its children are the points. To compare points, select children and press *Compare*: parameters are the axes'
values, metrics what the study measures, with `_low` and `_high` (95 % interval).
""",
}
"""What an experiment's page says of it, in Markdown."""

NOTE_TAG = "mlflow.note.content"


def store_folder() -> Path:
    """Where mlflow.db and mlruns/ are: the project, of an experiment that DVC runs in a copy (--temp, --queue) too."""
    of_dvc = os.environ.get("DVC_ROOT")
    if of_dvc and project.ROOT.is_relative_to(Path(of_dvc) / ".dvc" / "tmp"):
        return Path(of_dvc)
    return project.ROOT


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store_folder() / 'mlflow.db'}"


def open_tracking() -> "MlflowClient":
    """A client of the tracking store, checked to answer.

    Raises:
        ServiceError: the tracking server or store does not answer.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    import mlflow
    import requests

    uri = tracking_uri()
    try:
        if uri.startswith("http"):
            requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # whatever the store's driver raises
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        raise ServiceError(
            f"MLflow at {uri} cannot be reached ({type(error).__name__}: {reason}); "
            "start it, or unset MLFLOW_TRACKING_URI to log to mlflow.db in the project"
        ) from None
    return client


def experiment_id(client: "MlflowClient", name: str = EXPERIMENT) -> str:
    """The id of an experiment, which is created if it does not exist.

    Raises:
        DataError: it was deleted, or its artifacts are where the project's folder was before.
        ServiceError: the store does not take it.
    """
    from mlflow.exceptions import MlflowException

    check_experiment(client, name)
    note = {NOTE_TAG: NOTES[name]} if name in NOTES else {}
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if note and NOTE_TAG not in experiment.tags:  # what somebody has written there stays
            client.set_experiment_tag(experiment.experiment_id, NOTE_TAG, note[NOTE_TAG])
        return str(experiment.experiment_id)
    local = not tracking_uri().startswith("http")
    # Without this tag the UI opens its pages for chat models.
    kind = {"mlflow.experimentKind": "custom_model_development", **note}
    place = (store_folder() / "mlruns").as_uri() if local else None
    try:
        return str(client.create_experiment(name, place, tags=kind))
    except MlflowException as error:
        raise ServiceError(f"MLflow at {tracking_uri()}: {name} cannot be made ({first_line(error)})") from None


def check_experiment(client: "MlflowClient", name: str = EXPERIMENT) -> None:
    """Before any work: that an experiment which is there can be logged to.

    Raises:
        DataError: it was deleted, or its artifacts are where the project's folder was before.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return
    if experiment.lifecycle_stage == "deleted":
        raise DataError(
            f"MLflow: the experiment {name} was deleted; restore it: MLFLOW_TRACKING_URI={tracking_uri()} "
            f"mlflow experiments restore -x {experiment.experiment_id}"
        )
    here = store_folder() / "mlruns"
    there = local_folder(experiment.artifact_location)
    is_own = tracking_uri() == f"sqlite:///{store_folder() / 'mlflow.db'}"
    if is_own and there is not None and there.name == here.name and there.resolve() != here.resolve():
        raise DataError(
            f"MLflow: the artifacts of {name} are in {there}, and the project is in {store_folder()}: its folder was "
            "renamed or copied; tell mlflow.db: python -m tasks.services.moved"
        )


@contextmanager
def taken_by_mlflow(what: str) -> Iterator[None]:
    """Tell in one line of what the store does not take.

    Raises:
        ServiceError: the server, the database or the artifact store failed.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # OSError: of the connection, or of a local store of artifacts
        raise ServiceError(
            f"MLflow at {tracking_uri()} does not take {what} ({first_line(error)}); "
            "what was computed is kept: look at MLflow's log and its disk, then run it again"
        ) from error


@contextmanager
def logged_run(
    client: "MlflowClient", experiment: str, name: str, tags: dict[str, str], end: str = "FINISHED"
) -> Iterator[str]:
    """A run that ends with the block: after an error as FAILED.

    Yields:
        Its id.

    Raises:
        ServiceError: see `taken_by_mlflow`.
    """
    with taken_by_mlflow(f"the run {name}"):
        run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        try:
            yield run_id
        except BaseException:
            with suppress(Exception):  # the store may be gone, and what was raised first counts
                client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, end)


@dataclass(frozen=True)
class Linked:
    """What metrics are of, so that MLflow finds and ranks them by it: a dataset, and a logged model."""

    dataset: "Dataset"
    model_id: str


def log_batch(
    client: "MlflowClient",
    run_id: str,
    params: dict[str, str],
    metrics: dict[str, float],
    linked: Mapping[str, Linked] | None = None,
) -> None:
    """Log params and metrics in one call.

    Args:
        linked: what metrics are of, by their names; one that is not there is of the run alone.
    """
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    of = {name: (each.model_id, each.dataset.name, each.dataset.digest) for name, each in (linked or {}).items()}
    metric_keys, param_keys = mlflow_keys(metrics), mlflow_keys(params)
    client.log_batch(
        run_id,
        metrics=[Metric(metric_keys[name], value, now, 0, *of.get(name, ())) for name, value in metrics.items()],
        params=[Param(param_keys[name], value) for name, value in params.items()],
    )


def with_interval(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    """A figure and the ends of its interval as three metrics.

    Example:
        >>> with_interval("near/auroc", {"value": 0.9, "low": 0.8, "high": 0.95})
        {'near/auroc': 0.9, 'near/auroc_low': 0.8, 'near/auroc_high': 0.95}
    """
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def mlflow_keys(names: Iterable[str]) -> dict[str, str]:
    """Names as MLflow takes them for metrics and params: other characters become _, and all stay different.

    Example:
        >>> mlflow_keys(["near/auroc", "cats (indoor)/auroc"])
        {'near/auroc': 'near/auroc', 'cats (indoor)/auroc': 'cats _indoor_/auroc'}
    """
    keys: dict[str, str] = {}
    taken = set[str]()
    for name in names:
        key = re.sub(r"[^\w\-. /:]", "_", name)[:240]
        if key in taken:
            key = f"{key}-{hash_values(name)[:6]}"
        taken.add(key)
        keys[name] = key
    return keys


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's params, their keys joined by dots."""
    params: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        params |= flat(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return params


def run_tags(run: Run) -> dict[str, str]:
    tags = {
        "mlflow.source.name": "flows/evaluate.py",
        "mlflow.source.type": "PROJECT",
        "params_yaml": "as recorded" if run.own else "with other settings",
    }
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
        tags["dvc.baseline"] = os.environ.get("DVC_EXP_BASELINE_REV", "")
    for name in ("images", "manifest.parquet", *(f"models/seed-{seed}/denoiser" for seed in run.params.seeds)):
        if digest := dvc_hash(run, name):
            tags[f"dvc.{name}"] = digest
    if commit := git_output("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git_changed_files"] = str(len(git_output("status", "--porcelain", "--untracked-files=no").splitlines()))
    return tags


def dvc_hash(run: Run, name: str) -> str | None:
    """The hash that dvc.lock records for an output of the benchmark's folder; None if it records none."""
    lock = project.ROOT / "dvc.lock"
    if not lock.is_file():
        return None
    return _locked_outputs(lock.read_text(encoding="utf-8")).get(str((run.home / name).relative_to(project.ROOT)))


@lru_cache(maxsize=1)
def _locked_outputs(text: str) -> dict[str, str]:
    stages = (yaml.safe_load(text) or {}).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def git_output(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=project.ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
