"""A run in MLflow: how it ends, and what is said where the store takes nothing."""

import pytest
from mlflow.exceptions import MlflowException

from diffguard.errors import DataError, ServiceError
from tasks.services.tracking import experiment_id, log_batch, logged_run, open_tracking


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = open_tracking()
    return client, experiment_id(client, "runs"), tmp_path


def status(client, run_id):
    return client.get_run(run_id).info.status


@pytest.mark.parametrize("end", ["FINISHED", "FAILED"])
def test_it_ends_as_it_is_told(store, end):
    client, experiment, _ = store
    with logged_run(client, experiment, "name", {"a": "b"}, end) as run_id:
        assert status(client, run_id) == "RUNNING"
    assert status(client, run_id) == end
    assert client.get_run(run_id).data.tags["a"] == "b"


def test_an_error_of_ours_is_the_same_and_the_run_has_failed(store):
    client, experiment, _ = store
    with pytest.raises(DataError, match=r"^no image$"), logged_run(client, experiment, "name", {}) as run_id:
        raise DataError("no image")
    assert status(client, run_id) == "FAILED"


def test_what_the_store_does_not_take_is_one_line_that_names_the_innermost_run(store):
    client, experiment, folder = store
    runs = []

    def log():
        with (
            logged_run(client, experiment, "parent", {}) as parent,
            logged_run(client, experiment, "child", {}) as child,
        ):
            runs.extend([parent, child])
            log_batch(client, child, {"key": "one"}, {})
            log_batch(client, child, {"key": "two"}, {})  # a param stays what it is

    with pytest.raises(ServiceError) as told:
        log()
    assert isinstance(told.value.__cause__, MlflowException)
    assert str(told.value).startswith(f"MLflow at sqlite:///{folder}/mlflow.db does not take the run child (")
    assert "what was computed is kept" in str(told.value)
    assert "\n" not in str(told.value)
    assert [status(client, each) for each in runs] == ["FAILED", "FAILED"]


@pytest.mark.parametrize("error", [OSError("full"), None])
def test_of_a_store_that_is_gone_what_was_raised_first_counts(store, monkeypatch, error):
    client, experiment, _ = store

    def gone(*_, **__):
        raise ConnectionRefusedError("nobody answers")

    def log():
        with logged_run(client, experiment, "name", {}):
            monkeypatch.setattr(client, "set_terminated", gone)
            if error is not None:
                raise error

    with pytest.raises(ServiceError, match=rf"the run name \({error or 'nobody answers'}\)"):
        log()
