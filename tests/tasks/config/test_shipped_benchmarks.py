"""The benchmark files that come with the project: each opens, and `folder` runs as the README says."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from mlflow import MlflowClient
from own_project import CLASSES, save_pictures
from safetensors.torch import save_file
from small_project import work_in
from tiny_models import save_conditional

from tasks.bundle import bundle
from tasks.calibrate import calibrate
from tasks.config.benchmark import DENOISER
from tasks.config.params import load_params
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.doctor.command import examine
from tasks.evaluate.stage import evaluate
from tasks.log import log
from tasks.models.checks import check_models
from tasks.prepare.stage import make_ready
from tasks.score.stage import score
from tasks.train.stage import train
from tasks.validate import validate_manifest, validate_scores

NAMES = sorted(path.stem for path in (ROOT / "data" / "benchmarks").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_each_file_opens(name, tmp_path):
    run = open_run(name, root=None if name == load_params().benchmark else str(tmp_path))
    assert run.benchmark.name == name
    assert set(run.params.classifiers) <= run.benchmark.classifiers.keys()
    assert run.default in run.params.names
    assert run.specs.keys() == {DENOISER, *run.benchmark.classifiers}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, filled as folder.yaml says, and the project's settings in a folder of their own."""
    root, project = tmp_path / "mine", tmp_path / "project"
    for number, name in enumerate(CLASSES):
        save_pictures(root / "ind" / name, 28, number, size=(40, 50))
    save_pictures(root / "near", 6, 10, size=(40, 50))
    save_pictures(root / "far", 6, 11, size=(30, 50))
    save_conditional(root / "denoiser", len(CLASSES))
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=len(CLASSES))
    save_file(network.state_dict(), root / "classifier.safetensors")
    (project / "data" / "benchmarks").mkdir(parents=True)
    for name in ("folder", "digits"):
        shutil.copy(ROOT / "data" / "benchmarks" / f"{name}.yaml", project / "data" / "benchmarks")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluate"]["draws"] = 100
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    work_in(monkeypatch, project)
    return root, project


def test_folder_from_pictures_to_mlflow(folder):
    """The stages of the flow one after the other, on the shipped file and settings as they are."""
    root, project = folder
    choices = {"benchmark": "folder", "root": str(root)}
    run = open_run(**choices)
    assert examine(run) == 0
    make_ready(run.benchmark, run.home, run.params.prepare.seed)
    run = open_run(**choices)
    validate_manifest(run.manifest, run.home, 224, "RGB", len(CLASSES))
    assert check_models(run).keys() == {DENOISER, "mine"}
    for model in (DENOISER, "mine"):
        train(run, model, 0)
    items = score(run)
    validate_scores({item.title: item.read() for item in items}, run.scored["id"])
    thresholds, metrics = calibrate(run, items), evaluate(run, items)
    assert list(metrics["mine"]) == run.params.names
    for row in metrics["mine"].values():
        assert (row["near"]["n_ind"], row["near"]["n_ood"], row["far"]["n_ood"]) == (12, 6, 6)
    assert (bundle(run, items) / "detector.json").is_file()
    parent = log(run, items, metrics, thresholds)

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    by_name = {each.data.params["detector"]: each for each in children}
    assert by_name.keys() == set(run.params.names)
    found = by_name[run.default]
    assert found.data.metrics["near/auroc"] == metrics["mine"][run.default]["near"]["auroc"]["value"]
    assert {each.path for each in client.list_artifacts(found.info.run_id, "samples")} == {
        f"samples/{name}.png" for name in ("ind", "near", "far")
    }
    assert json.loads((run.results / "metrics.json").read_text()) == metrics
    results = Path(client.download_artifacts(parent, "results.md")).read_text()
    assert "\n- warning: far: 50x30 files are enlarged 8.53x, InD's of 50x40 are enlarged 6.4x: smoothness " in results
