"""Lists what is safe to remove: what runs with other settings have left, and MLflow runs that nothing needs.

    python -m tasks.clean                      # lists, and removes nothing
    python -m tasks.clean --days 90 --remove

Of files only those under data/<benchmark>/other/, which are none of DVC's, and shards that a killed run has half
written. Whatever is removed can be made again by the run that made it; models take the longest. Of MLflow's runs those
of evaluations that no version of a registered model comes from.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from diffguard.errors import ServiceError
from tasks.common.console import run_stage
from tasks.common.exclusive import exclusive
from tasks.config import project
from tasks.config.run import EVALUATION_LOCK
from tasks.services.tracking import EXPERIMENT, open_tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as LoggedRun

DAY_SECONDS = 86400.0

KINDS = {"scores": "score folder", "models": "model", "runs": "results of a run", "docs": "pages of the validation"}
"""The folders of other/ whose entries are removed whole."""


@dataclass(frozen=True)
class Old:
    """A file or folder that no run has used for long."""

    path: Path
    kind: str
    bytes: int


def old_files(other: Path, before: float) -> list[Old]:
    """What is old under a benchmark's folder other/.

    Args:
        before: seconds since 1970; what a run has used since is not old.
    """
    found = []
    for folder, kind in KINDS.items():
        for path in sorted((other / folder).iterdir()) if (other / folder).is_dir() else []:
            files = [path, *path.rglob("*")]
            if max(each.stat().st_mtime for each in files) < before:
                found.append(Old(path, kind, sum(each.stat().st_size for each in files if each.is_file())))
    for path in sorted(other.rglob("*.lock")):
        if path.name != EVALUATION_LOCK and path.stat().st_mtime < before:
            found.append(Old(path, "lock", 0))
    for path in sorted(other.parent.glob("**/.shard-*")):  # half written by a run that was killed
        if path.stat().st_mtime < before:
            found.append(Old(path, "half-written shard", path.stat().st_size))
    return found


def remove(old: Old) -> None:
    """Remove it; a lock only if nobody holds it."""
    if old.kind == "lock":
        lock = FileLock(old.path, blocking=False)
        try:
            with lock:
                old.path.unlink(missing_ok=True)
        except Timeout:
            pass
    elif old.path.is_dir():
        shutil.rmtree(old.path)
    else:
        old.path.unlink(missing_ok=True)


def old_runs(client: "MlflowClient", before: float) -> list["LoggedRun"]:
    """Evaluations that ended long ago, with their rows, and that no version of a registered model comes from.

    What production images were seen, what was recalibrated and how models were trained stays.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    ids = [] if experiment is None else [experiment.experiment_id]
    runs = _all(client.search_runs, experiment_ids=ids) if ids else []
    registered = {version.run_id for version in _all(client.search_model_versions)}
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId", run.info.run_id) for run in runs}
    needed = {parents.get(run_id, run_id) for run_id in registered}
    return [
        run
        for run in runs
        if run.info.end_time is not None
        and run.info.end_time / 1000 < before
        and parents[run.info.run_id] not in needed
    ]


def _all(search: Any, **options: Any) -> list[Any]:
    """Every page of one of MLflow's searches."""
    found = search(**options)
    results = list(found)
    while found.token:
        found = search(**options, page_token=found.token)
        results += found
    return results


def clean(days: float, *, removes: bool) -> None:
    """List what is old, and remove it if told to.

    Raises:
        ServiceError: MLflow does not answer.
    """
    before = time.time() - days * DAY_SECONDS
    total = 0
    for other in sorted(project.ROOT.glob("data/*/other")):
        home = str(other.parent.relative_to(project.ROOT))
        try:
            with exclusive(other / EVALUATION_LOCK, home, "tasks.clean", wait=False):
                for old in old_files(other, before):
                    print(f"{old.bytes / 1e6:10.1f} MB  {old.kind}  {old.path.relative_to(project.ROOT)}")
                    total += old.bytes
                    if removes:
                        remove(old)
        except ServiceError as error:
            print(f"{error}; left as it is")
    client = open_tracking()
    runs = old_runs(client, before)
    for run in runs:
        print(f"{'':10}     MLflow run  {run.info.run_name} ({run.info.run_id})")
        if removes:
            client.delete_run(run.info.run_id)
    told = "removed" if removes else "can be removed; nothing was, without --remove"
    print(f"{total / 1e6:.1f} MB of files and {len(runs)} MLflow runs {told}")
    if removes and runs:
        print("MLflow keeps a deleted run's files until: mlflow gc")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.clean", description="List, and with --remove remove, what no run has used for long."
    )
    parser.add_argument("--days", type=float, default=30, help="since the last use (30)")
    parser.add_argument("--remove", action="store_true", help="remove it; otherwise it is only listed")
    options = parser.parse_args()
    if options.days < 0:
        parser.error("--days: below 0")
    clean(options.days, removes=options.remove)


if __name__ == "__main__":
    run_stage(main)
