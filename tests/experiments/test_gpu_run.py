"""The run that waits for a GPU, rehearsed whole on a machine that has only what a bare one has."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[2] / "experiments" / "gpu"
BARE = ["torch", "torchvision", "timm", "pandas", "scikit-learn"]
LARGEST = 16 * 2**20


def uv():
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip("uv is not here to make an environment with")


def run(*command, **environment):
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A new environment, its Python, and the wheels that were collected for it."""
    folder = tmp_path_factory.mktemp("bare")
    wanted = run(uv(), "python", "find", "--no-python-downloads", "3.12").stdout.strip() or sys.executable
    assert run(uv(), "venv", "--python", wanted, folder / "venv").returncode == 0
    python = folder / "venv" / "bin" / "python"
    installed = run(uv(), "pip", "install", "--python", python, *BARE)
    if installed.returncode:
        pytest.skip(f"the environment cannot be made: {installed.stderr.strip()[-300:]}")
    version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    collected = run(sys.executable, GPU / "collect.py", "--python", version, "--to", folder / "collected")
    if collected.returncode:
        pytest.skip(collected.stderr.strip()[-300:])
    return python, folder / "collected"


def rehearsed(bare, *options):
    python, collected = bare
    script = ("bash", GPU / "run.sh", "--rehearse", "--collected", collected)
    done = run(*script, *options, PYTHON=str(python), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.timeout(1800)
def test_what_it_trains_and_scores_is_rehearsed(bare, tmp_path):
    rehearsed(bare, "--only", "images", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step/images"]["exit"] == 0
    scores = results["cifar10/scores"]
    assert {"cfg-w1", "unconditional", "path", "knn", "complexity", "fused-cfg-w1"} <= set(scores["metrics"])
    assert all(0 <= row["auroc"]["value"] <= 1 for row in scores["metrics"].values())
    # Without OpenCV there is no CAM.
    assert list(scores["left_out"]) == ["paper-cfg"]
    accuracies = results["cifar10/denoiser-accuracy"]
    assert accuracies[-1]["images_seen"] == results["cifar10/denoiser"]["images_seen"]
    assert set(results["cifar10/patch"]["loss"]) == {"2", "4"}
    files = list(tmp_path.iterdir())
    assert len(files) <= 8
    assert max(path.stat().st_size for path in files) <= LARGEST


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_tests_and_the_published_schedule_are_rehearsed(bare, tmp_path):
    rehearsed(bare, "--only", "tests,published", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    for step in ("tests", "published"):
        assert results[f"step/{step}"]["exit"] == 0
    assert {outcome for outcome, _ in results["tests"].values()} <= {"passed", "skipped"}
    assert results["tests"]["test_a_gpu_scores_as_a_processor_does"][0] == "passed"
    rows = results["published/rows"]
    assert {(row["model"], row["schedule"]) for row in rows} == {
        (model, schedule)
        for model in ("pixel", "latent")
        for schedule in ("engine", "published schedule", "plain batching")
    }
    assert all(row["images_per_second"] > 0 and row["share_of_matrix_rate"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_run_goes_on_from_the_first(bare, tmp_path):
    rehearsed(bare, "--only", "images", "--out", tmp_path / "first")
    rehearsed(bare, "--only", "images", "--resume", tmp_path / "first", "--out", tmp_path / "second")
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    resumed = json.loads((tmp_path / "second" / "results.json").read_text())
    assert resumed["cifar10/denoiser"]["images_seen"] > results["cifar10/denoiser"]["images_seen"]
    assert resumed["cifar10/denoiser"]["curve"][0][1] < results["cifar10/denoiser"]["curve"][0][1]
    assert resumed["cifar10/classifier"]["from"] == str(tmp_path / "first")
    assert resumed["cifar10/classifier"]["accuracy"] == results["cifar10/classifier"]["accuracy"]


def test_what_is_missing_is_said(tmp_path):
    done = run("bash", GPU / "run.sh", "--rehearse", "--collected", tmp_path, "--out", tmp_path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert f"error: {tmp_path}/wheels: no wheels; run: python experiments/gpu/collect.py" in done.stderr
    done = run("bash", GPU / "run.sh", "--fast", PYTHON=sys.executable)
    assert done.returncode == 2
    assert "error: --fast: not an option of run.sh" in done.stderr


def test_what_comes_back_fits_into_eight_files():
    """Weights in float16 at full size, in parts beside results.json; the other files are some hundred KiB."""
    from cifar10 import CLASSIFIER, NETWORKS, PART

    from diffguard.training import untrained_classifier, untrained_denoiser

    classifier = untrained_classifier((3, 32, 32), 10, CLASSIFIER)
    for settings in NETWORKS.values():
        denoiser = untrained_denoiser((3, 32, 32), 10, settings).unet
        values = sum(each.numel() for network in (classifier, denoiser) for each in network.state_dict().values())
        assert 2 * values + 2**20 < 7 * PART
