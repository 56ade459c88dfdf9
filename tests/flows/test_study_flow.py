"""A study of one's own, which is a YAML file and nothing else, as its user runs it."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from mlflow import MlflowClient
from own_project import own_benchmark, save_own, write_own
from PIL import Image

from tasks.config.project import ROOT

STUDY = """
title: Scales
question: Which scale is best?
claim:
  {says: guidance of scale 2 beats none, source: nowhere, measure: near auroc, of: label scale=2, above: label scale=0}
benchmarks: [mine]
rows: [msp]
variants:
  label:
    base: {stop: 2, guidance: {kind: label}, distance: l1}
    grid: {guidance.scale: [0, 2]}
  early-stop:
    base: {stop: {max_level: 3, thresholds: {psnr: null}, median_at: 2}, guidance: {kind: label}, distance: l1}
compare: {to: label scale=0}
measure: [near auroc, near fpr95, evaluations, stop, ind score, rejected]
figure: {x: scale, y: [near auroc, rejected]}
curve: {base: {stop: 2, guidance: {kind: none}, distance: l1}, similarities: [psnr, l1], images: 5, at: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    patch = pytest.MonkeyPatch()
    save_own(root)
    write_own(patch, root, own_benchmark())
    patch.undo()
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["evaluate"]["draws"] = 100
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "data" / "studies").mkdir()
    (root / "data" / "studies" / "scales.yaml").write_text(STUDY)
    return root


def run(place, *studies):
    """The command for each of these studies, one after the other, where that folder is taken for the project's."""
    code = (
        "import pathlib, sys, tasks.config.project as project\n"
        f"project.ROOT = pathlib.Path({str(place)!r})\n"
        "from flows.study import main\n"
        f"for study in {studies}:\n"
        f"    sys.argv = ['study', '--root', {str(place)!r}, '--study', study]\n"
        "    print('STUDY', study, flush=True)\n"
        "    main()"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    own = {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(place / ".prefect"), "DO_NOT_TRACK": "1"}
    own["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "180"  # as the project's pyproject.toml has it
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=place, env=kept | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500
    )


def test_a_study_runs_resumes_with_nothing_to_score_and_is_logged(place):
    done = run(place, "scales", "scales", "nothing")
    first, again, wrong = done.stdout.split("STUDY ")[1:]
    assert "| `label scale=2` |" in first, done.stdout
    assert "score shards 0 to" in first
    assert "| `label scale=2` |" in again, done.stdout
    assert "score shards" not in again
    assert done.returncode == 1
    assert wrong.startswith("nothing\nerror: study: 'nothing' is not one of scales\n")
    folders = list((place / "data/mine/other/scores").iterdir())
    assert len(folders) == 4  # msp and three points

    results = json.loads((place / "data/mine/studies/scales/results.json").read_text())
    points = {point["name"]: point["measures"] for point in results["points"]}
    assert list(points) == ["msp", "label scale=0", "label scale=2", "early-stop"]
    assert points["label scale=2"]["evaluations"] is None  # of a denoiser that this project has not trained
    assert points["label scale=2"]["stop"] == {"value": 2, "low": 2, "high": 2}
    assert points["early-stop"]["stop"]["low"] <= points["early-stop"]["stop"]["value"] <= 3
    assert points["label scale=0"]["near auroc"]["low"] < points["label scale=0"]["near auroc"]["high"]
    assert [each["of"] for each in results["differences"]] == ["msp", "label scale=2", "early-stop"]
    page = (place / "docs/studies/scales.md").read_text()
    assert "Near AUROC of `label scale=2` is" in page
    for name in ("scales-mine.png", "scales-mine-curve.png"):
        assert (place / "docs/studies" / name).stat().st_size < 100 * 1024
        with Image.open(place / "docs/studies" / name) as picture:
            assert picture.width > 400

    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("diffguard-studies").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 2
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert {run.data.params["point"] for run in children} == set(points)
    [child] = [run for run in children if run.data.params["point"] == "label scale=2"]
    assert child.data.params["scale"] == "2"
    assert child.data.metrics["near/auroc"] == points["label scale=2"]["near auroc"]["value"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {each.path for each in client.list_artifacts(parents[0].info.run_id)} >= {"results.json", "table.md"}
