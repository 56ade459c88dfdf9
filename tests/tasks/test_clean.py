"""What no run has used for long is listed, and removed if one says so; nothing else is."""

import os
import time

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from small_project import work_in

from tasks.clean import clean
from tasks.common.exclusive import exclusive

OLD = time.time() - 40 * 86400


def put(path, *, is_old):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1000)
    if is_old:
        for each in (path, path.parent):
            os.utime(each, (OLD, OLD))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    work_in(monkeypatch, tmp_path)
    home = tmp_path / "data" / "digits"
    keep = [
        put(home / "scores" / "tracked" / "shard-00000.parquet", is_old=True),
        put(home / "models" / "seed-0" / "model.pt", is_old=True),
        put(home / "other" / "scores" / "new" / "shard-00000.parquet", is_old=False),
        put(home / "other" / "models" / "new" / "model.pt", is_old=False),
        put(home / "other" / "locks" / "held.lock", is_old=True),
    ]
    # A folder is as new as the newest file in it: its shards are old, and a run has used it today.
    put(home / "other" / "scores" / "used" / "shard-00000.parquet", is_old=True)
    keep.append(put(home / "other" / "scores" / "used" / "made_by.json", is_old=False))
    old = [
        put(home / "other" / "scores" / "old" / "shard-00000.parquet", is_old=True),
        put(home / "other" / "models" / "old" / "model.pt", is_old=True),
        put(home / "other" / "runs" / "old" / "metrics.json", is_old=True),
        put(home / "other" / "locks" / "old.lock", is_old=True),
        put(home / "scores" / "tracked" / ".shard-00001.1-2.parquet", is_old=True),
    ]
    return home, keep, old


def log(client, experiment, name, parent=None):
    tags = {} if parent is None else {"mlflow.parentRunId": parent}
    run = client.create_run(experiment, start_time=int(OLD * 1000), run_name=name, tags=tags).info.run_id
    client.set_terminated(run, end_time=int(OLD * 1000))
    return run


def test_what_is_old_is_listed_and_removed_only_if_asked_to(place, tmp_path, capsys):
    home, keep, old = place
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.create_experiment("diffguard")
    other = client.create_experiment("diffguard-monitor")
    registered, forgotten = (log(client, experiment, name) for name in ("registered", "forgotten"))
    runs = {name: log(client, experiment, name, parent) for name, parent in (("row", registered), ("old", forgotten))}
    monitored = log(client, other, "monitored")
    client.create_registered_model("diffguard-digits")
    client.create_model_version("diffguard-digits", str(tmp_path), run_id=runs["row"])

    def left():
        return {run.info.run_id for run in client.search_runs([experiment, other])}

    everything = {registered, forgotten, monitored, *runs.values()}
    clean(30, removes=False)
    listed = capsys.readouterr().out
    assert all(path.exists() for path in keep + old)
    assert left() == everything
    for path in old:
        entry = path if path.name.startswith(".") or path.suffix == ".lock" else path.parent
        assert str(entry.relative_to(tmp_path)) in listed
    assert "other/scores/used" not in listed
    assert "and 2 MLflow runs can be removed; nothing was, without --remove" in listed

    with exclusive(home / "other" / "evaluation.lock", "data/digits", "flow run blue-fox"):
        clean(30, removes=True)
    assert "data/digits is in use by flow run blue-fox" in capsys.readouterr().out
    assert all(path.exists() for path in keep + old)
    assert left() == everything - {forgotten, runs["old"]}

    with FileLock(home / "other" / "locks" / "held.lock"):
        os.utime(home / "other" / "locks" / "held.lock", (OLD, OLD))
        clean(30, removes=True)
    assert all(path.exists() for path in keep)
    assert not [path for path in old if path.exists()]
