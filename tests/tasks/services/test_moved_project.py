"""A project whose folder was renamed, and an experiment that was deleted: told before any work, with what mends it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import work_in

import tasks.services.moved
from diffguard.errors import DataError
from tasks.services.tracking import EXPERIMENT, check_experiment, experiment_id, open_tracking
from tasks.services.training_log import TRAINING, open_training
from tasks.workflow import check_tracking

LOGS_MORE = """
import sys
from mlflow import MlflowClient, artifacts
client, [run_id] = MlflowClient(), sys.argv[1:]
client.log_text(run_id, "more", "more.txt")
print(*sorted(file.path for file in client.list_artifacts(run_id)))
print(artifacts.load_text(f"{client.get_run(run_id).info.artifact_uri}/note.txt"))
"""


@pytest.fixture
def renamed(tmp_path, monkeypatch):
    """A project with a run that has an artifact, and a model, in a folder of another name by now."""
    (tmp_path / "my project").mkdir()
    work_in(monkeypatch, tmp_path / "my project")
    client = open_tracking()
    run_id = client.create_run(experiment_id(client)).info.run_id
    client.log_text(run_id, "told", "note.txt")
    client.create_registered_model("m")
    client.create_model_version("m", f"{client.get_run(run_id).info.artifact_uri}/m", run_id)
    # MLflow keeps the engine of a store, which is the old file.
    (tmp_path / "my project").rename(tmp_path / "new")
    work_in(monkeypatch, tmp_path / "new")
    monkeypatch.setattr(tasks.services.moved.project, "ROOT", tmp_path / "new")
    return tmp_path / "new", run_id


def test_a_renamed_project_is_told_before_any_work_and_mended(renamed, tmp_path, capsys):
    root, run_id = renamed
    with pytest.raises(DataError, match=r"the artifacts of diffguard are in .*my project/mlruns, and the project is"):
        check_tracking.fn()
    with pytest.raises(DataError, match=r"tell mlflow.db: python -m tasks\.services\.moved"):
        experiment_id(open_tracking())
    assert not (tmp_path / "my project").exists()
    tasks.services.moved.main()
    assert "4 places in mlflow.db are now under" in capsys.readouterr().out
    client = open_tracking()
    check_tracking.fn()
    # Another process, as this one has kept where the run's artifacts were.
    done = subprocess.run([sys.executable, "-c", LOGS_MORE, run_id], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["more.txt", "note.txt", "told"]
    assert (root / "mlruns" / run_id / "artifacts" / "more.txt").is_file()
    assert client.get_model_version("m", "1").source == f"{(root / 'mlruns').as_uri()}/{run_id}/artifacts/m"
    assert not (tmp_path / "my project").exists()
    tasks.services.moved.main()
    assert "0 places" in capsys.readouterr().out


def test_there_is_nothing_to_move_in_a_new_project(tmp_path):
    with pytest.raises(DataError, match=r"mlflow\.db: no such store"):
        tasks.services.moved.move(tmp_path / "mlflow.db", tmp_path / "mlruns")
    assert not (tmp_path / "mlflow.db").exists()


def test_training_goes_on_without_its_experiment(tmp_path, monkeypatch, capsys):
    work_in(monkeypatch, tmp_path)
    client = open_tracking()
    client.delete_experiment(experiment_id(client, TRAINING))
    assert open_training(None, "denoiser", None, 0, tmp_path / "note") is None
    said = capsys.readouterr().out
    assert f"warning: the training is not logged: MLflow: the experiment {TRAINING} was deleted; restore it: " in said


@pytest.mark.parametrize("name", [EXPERIMENT, "diffguard-monitor", "diffguard-calibrate"])
def test_a_deleted_experiment_is_told_before_any_work_and_restored_by_the_command(name, tmp_path, monkeypatch):
    work_in(monkeypatch, tmp_path)
    client = open_tracking()
    client.delete_experiment(experiment_id(client, name))
    with pytest.raises(DataError, match=f"the experiment {name} was deleted; restore it: ") as error:
        check_tracking.fn()
    command = str(error.value).partition("restore it: ")[2]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    variable, *words = shlex.split(command)
    environment |= dict([variable.split("=", 1)])
    subprocess.run(words, env=environment, check=True, capture_output=True)
    check_experiment(client, name)
