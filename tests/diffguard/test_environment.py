"""What a model installs elsewhere: this library as it carries it, and nothing by a name that is somebody else's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_detector import Made

import diffguard
import diffguard.mlflow as flavor
from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.images import to_picture
from diffguard.models.classifiers.wrapped import NetworkClassifier
from diffguard.serving.requests import encode_image
from diffguard.settings import LibraryClassifier

ROOT = Path(diffguard.__file__).parents[1]
OTHERS = re.compile(r"pip install[^\n]*['\" ]diffguard(?!-ood)|\bdiffguard(==|\[[a-z]+\])|name = \"diffguard\"")
"""The name of another project's distribution, where one would install it."""


@pytest.fixture(scope="module")
def made(classifier, denoiser):
    return Made(classifier, denoiser)


@pytest.fixture(scope="module")
def model(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    save_bundle(made.detector("fused"), folder / "bundle")
    flavor.save_model(folder / "bundle", folder / "model")
    return folder / "model"


def without_pip_settings():
    """As on another machine; uv reads none of them."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHONPATH", "MLFLOW_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**environment, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}


def test_no_file_tells_anyone_to_install_by_anothers_name():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no clone: its files are not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {name: (ROOT / name).read_bytes().decode(errors="replace") for name in listed.split("\n") if name}
    found = {name: match[0] for name, text in texts.items() if (match := OTHERS.search(text)) and name != OWN}
    assert found == {}
    assert 'name = "diffguard-ood"' in texts["pyproject.toml"]


OWN = "tests/diffguard/test_environment.py"


@pytest.mark.parametrize("text", ["pip install 'diffguard[mlflow]'", "diffguard==0.1.0", "run: pip install diffguard"])
def test_the_name_would_be_found(text):
    assert OTHERS.search(text)
    assert not OTHERS.search(text.replace("diffguard", "diffguard-ood"))


def test_the_model_carries_the_code_that_runs(model):
    package = Path(diffguard.__file__).parent
    carried = {path.relative_to(model / "code").as_posix(): path.read_bytes() for path in model.rglob("code/**/*.py")}
    running = {path: path.read_bytes() for path in package.rglob("*.py")}
    assert carried == {f"diffguard/{path.relative_to(package).as_posix()}": code for path, code in running.items()}
    # What is installed is found whatever folder it is installed from, as `mlflow models build-docker` has another.
    requirements = (model / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in requirements)
    assert not any("diffguard" in line for line in requirements)
    out = model.parent / "docker"
    command = [sys.executable, "-m", "mlflow", "models", "generate-dockerfile", "-m", str(model), "-d", str(out)]
    subprocess.run(command, env=without_pip_settings(), check=True, capture_output=True, timeout=300)
    copied = re.search(r"COPY (\S+) /opt/ml/model", (out / "Dockerfile").read_text())[1]
    assert (out / copied / "code" / "diffguard" / "mlflow.py").is_file()


def test_a_network_of_timm_brings_timm(made, tmp_path, monkeypatch):
    import timm

    bundle = tmp_path / "bundle"
    spec = LibraryClassifier(kind="timm", name="test_resnet", weights=str(tmp_path / "w.safetensors"))
    network = timm.create_model("test_resnet", num_classes=6, in_chans=1)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    detector = made.detector("msp", specs={"classifier": spec})
    detector.classifier = NetworkClassifier(network, mean=(0.0,), std=(1.0,), size=32)
    save_bundle(detector, bundle)
    assert flavor._classifier_requirements(bundle) == [f"timm=={timm.__version__}"]


def test_the_models_environment_is_made_from_nothing_and_predicts(made, model, tmp_path):
    if shutil.which("uv", path=without_pip_settings()["PATH"]) is None:
        pytest.skip("uv is not installed")
    images = [encode_image(to_picture(image)) for image in made.new[:3]]
    (tmp_path / "in.json").write_text(
        json.dumps({"dataframe_split": {"columns": ["image"], "data": [[i] for i in images]}})
    )
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", str(model), "--env-manager", "uv"]
    environment = {
        **without_pip_settings(),
        "MLFLOW_ENV_ROOT": str(tmp_path / "environments"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    done = subprocess.run(
        [*command, "-i", "in.json", "-o", "out.json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # None of its name is in that environment: it is the model's.
    assert not list((tmp_path / "environments").rglob("site-packages/diffguard*"))
    rows = json.loads((tmp_path / "out.json").read_text())["predictions"]
    expected = load_bundle(model / "detector", "cpu").decide(made.new[:3])
    assert [row["score"] for row in rows] == pytest.approx([each.score for each in expected], abs=1e-4)
