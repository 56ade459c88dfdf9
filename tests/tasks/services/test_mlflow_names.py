"""Names that MLflow does not take are cleaned on the way there, and stay apart."""

import re

import pytest
from own_project import own_benchmark, save_own, write_own

from tasks.bundle import bundle
from tasks.calibrate import calibrate
from tasks.config.benchmark import DENOISER
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.log import log
from tasks.prepare.stage import prepare_if_changed
from tasks.register import register
from tasks.score.stage import score
from tasks.services.tracking import experiment_id, log_batch, mlflow_keys, open_tracking
from tasks.train.stage import train

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


def test_a_dataset_and_a_row_of_such_names_go_all_the_way(tmp_path, monkeypatch):
    """From files to a registered version, where the last stages are MLflow's."""
    save_own(tmp_path / "own")
    benchmark = own_benchmark()
    benchmark["near"] = {"cats (indoor)": benchmark["near"]["near"], "cats [indoor]": benchmark["far"].pop("far")}
    benchmark["variants"]["cam + w=2"] = benchmark["variants"].pop("cam")
    benchmark |= {"detectors": ["cam + w=2", "msp"], "default": "cam + w=2"}
    write_own(monkeypatch, tmp_path, benchmark)
    options = {"benchmark": "mine", "root": str(tmp_path / "own")}
    run = open_run(**options)
    prepare_if_changed(run.benchmark, run.home, seed=0)
    run = open_run(**options)
    for model in (DENOISER, "mine"):
        train(run, model, 0)
    items = score(run)
    thresholds, metrics = calibrate(run, items), evaluate(run, items)
    assert bundle(run, items) is not None
    parent = log(run, items, metrics, thresholds)
    assert register(run, parent, metrics).version == "1"
    client = open_tracking()
    [child] = client.search_runs(
        [experiment_id(client)], f"tags.mlflow.parentRunId = '{parent}' and params.detector = 'cam + w=2'"
    )
    logged = [value for key, value in child.data.metrics.items() if re.fullmatch(r"cats _indoor_/auroc(-\w{6})?", key)]
    found = metrics["mine"]["cam + w=2"]
    assert sorted(logged) == pytest.approx(sorted(found[name]["auroc"]["value"] for name in benchmark["near"]))
