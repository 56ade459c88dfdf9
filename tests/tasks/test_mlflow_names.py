"""Names that MLflow does not take are cleaned on the way there, and stay apart."""

import pytest

from tasks.log import experiment_id, log_batch, mlflow_keys, open_tracking

NAMES = [
    "cats (indoor)/auroc",
    "cats [indoor]/auroc",
    "naïve/auroc",
    "a+b/auroc",
    "100%/auroc",
    "near/auroc",
    "猫/auroc",
]


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return open_tracking()


def test_all_arrive_under_names_of_their_own(client):
    run_id = client.create_run(experiment_id(client)).info.run_id
    log_batch(client, run_id, {name: "x" for name in NAMES}, {name: float(number) for number, name in enumerate(NAMES)})
    data = client.get_run(run_id).data
    assert sorted(data.metrics.values()) == list(range(len(NAMES)))
    assert data.metrics["near/auroc"] == 5
    assert len(data.params) == len(NAMES)
    assert set(data.metrics) == set(mlflow_keys(NAMES).values())
