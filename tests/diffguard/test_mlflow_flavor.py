"""The MLflow flavor on a real store: saved, logged, registered, loaded, and served as a Python function."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from small_detector import Made

import diffguard.mlflow as flavor
from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.errors import DataError, ServiceError
from diffguard.images import to_picture
from diffguard.loading import open_detector
from diffguard.serving.requests import encode_image

OUTPUTS = ["label", "class_name", "confidence", "score", "p_value", "is_ood"]


@pytest.fixture(scope="module")
def made(classifier, denoiser):
    return Made(classifier, denoiser)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("store")
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    patch.chdir(root)
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    mlflow.create_experiment("detectors", (root / "artifacts").as_uri())
    mlflow.set_experiment("detectors")
    yield root
    patch.undo()
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def logged(made, store):
    save_bundle(made.detector("gated"), store / "bundle")
    with mlflow.start_run():
        info = flavor.log_model(store / "bundle", registered_model_name="diffguard-tiny")
    mlflow.MlflowClient().set_registered_model_alias("diffguard-tiny", "champion", info.registered_model_version)
    return info


@pytest.fixture(scope="module")
def function(logged):
    return mlflow.pyfunc.load_model("models:/diffguard-tiny@champion")


def encoded(made, rows):
    return [encode_image(to_picture(image)) for image in made.new[rows]]


def test_the_model_tells_flavors_signature_example_and_requirements(logged, store):
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri))
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert set(model["flavors"]) == {"diffguard", "python_function"}
    assert model["flavors"]["python_function"]["loader_module"] == "diffguard.mlflow"
    assert [each["name"] for each in json.loads(model["signature"]["inputs"])] == ["image"]
    assert [each["name"] for each in json.loads(model["signature"]["outputs"])] == [*OUTPUTS, "reconstruction"]
    assert json.loads(model["signature"]["params"])[0]["name"] == "reconstruction"
    [[text]] = json.loads((folder / "input_example.json").read_text())["data"]
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        assert picture.size == (8, 8)
    lines = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    assert {"mlflow", "torch", "diffusers", "pytorch-ood", "pillow"} <= lines
    assert (folder / "code" / "diffguard" / "mlflow.py").is_file()
    for path in ("requirements.txt", "conda.yaml", "python_env.yaml", "MLmodel"):
        assert not re.search(r"https?://|--(extra-)?index|--find-links|\+cpu", (folder / path).read_text()), path


def test_the_python_function_decides_as_the_bundle_does(made, function, store):
    table = function.predict(pd.DataFrame({"image": encoded(made, range(24))}))
    assert table.columns.tolist() == OUTPUTS
    expected = load_bundle(store / "bundle", "cpu").decide(made.new)
    for row, each in zip(table.itertuples(), expected, strict=True):
        assert (row.label, row.class_name, row.is_ood) == (each.label, each.class_name, each.is_ood)
        assert [row.confidence, row.score, row.p_value] == pytest.approx(
            [each.confidence, each.score, each.p_value], abs=1e-4
        )


def test_reconstructions_come_as_pictures_where_something_was_diffused(made, function):
    inputs = pd.DataFrame({"image": encoded(made, range(24))})
    table = function.predict(inputs, params={"reconstruction": True})
    diffused = made.combined["gated"].undecided(made.scores["new", ""]["pixel-knn"])
    assert table["reconstruction"].notna().tolist() == diffused.tolist()
    with Image.open(io.BytesIO(base64.b64decode(table["reconstruction"].dropna().iloc[0]))) as picture:
        assert picture.size == (8, 8)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("no base64!", r"images\[1\]: not base64"),
        (base64.b64encode(b"hello").decode(), r"images\[1\]: neither a PNG nor a JPEG file"),
        ("", r"images\[1\]: zero bytes"),
        (encode_image(Image.new("L", (5000, 5000))), r"images\[1\]: 5000x5000 pixels; the limit"),
    ],
)
def test_a_bad_image_is_an_invalid_parameter_in_one_line(made, function, image, words):
    with pytest.raises(mlflow.exceptions.MlflowException, match=words) as error:
        function.predict(pd.DataFrame({"image": [*encoded(made, [0]), image]}))
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"
    assert "\n" not in error.value.message


@pytest.mark.parametrize("table", [{"picture": ["x"]}, {"image": [3]}, {"image": []}, {"image": [None]}])
def test_a_table_of_another_kind_is_refused(function, table):
    with pytest.raises(mlflow.exceptions.MlflowException):
        function.predict(pd.DataFrame(table))


def test_a_detector_comes_by_alias_version_and_run(made, logged):
    for uri in ("models:/diffguard-tiny@champion", "models:/diffguard-tiny/1", f"runs:/{logged.run_id}/detector"):
        detector = open_detector(uri, "cpu")
        assert np.allclose(
            [each.score for each in detector.decide(made.new)], made.scores["new", ""]["gated"], atol=1e-4
        )


def test_what_mlflow_does_not_have_is_named_in_one_line(store, logged):
    for uri in ("models:/diffguard-tiny@nobody", "models:/nothing/1", "runs:/0123/detector"):
        with pytest.raises(ServiceError, match=re.escape(uri)) as error:
            open_detector(uri)
        assert "\n" not in str(error.value)


def test_a_model_whose_bundle_was_changed_is_refused(made, store, tmp_path):
    flavor.save_model(made.detector("knn"), tmp_path / "model")
    assert open_detector(f"file://{tmp_path}/model", "cpu").info.detector == "knn"
    path = tmp_path / "model" / "detector" / "calibration.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"calibration.parquet: not as it was written"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))
    with pytest.raises(DataError, match=r"calibration.parquet: not as it was written"):
        flavor.save_model(tmp_path / "model" / "detector", tmp_path / "again")


def test_a_model_whose_bundle_was_exchanged_is_refused(made, tmp_path):
    flavor.save_model(made.detector("knn"), tmp_path / "model")
    recorded = yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())["flavors"]["diffguard"]["bundle_hash"]
    assert open_detector(f"file://{tmp_path}/model", "cpu").bundle_hash == recorded
    save_bundle(made.detector("knn", alpha=0.5), tmp_path / "model" / "detector")  # whole, but another
    for load in (mlflow.pyfunc.load_model, flavor.load_model):
        with pytest.raises(DataError, match=r"detector.json: not the one that was recorded with the model"):
            load(str(tmp_path / "model"))


def test_a_model_of_a_run_is_in_the_runs_experiment_whatever_is_active_here(store, logged):
    client = mlflow.MlflowClient()
    other = client.create_experiment("others", (store / "others").as_uri())
    run = client.create_run(other)
    client.log_param(run.info.run_id, "kind", "own")
    info = flavor.log_model(store / "bundle", run_id=run.info.run_id, tags={"made": "here"}, params={"more": 1})
    model = client.get_logged_model(info.model_id)
    assert (model.experiment_id, model.source_run_id) == (other, run.info.run_id)
    assert (model.params, model.tags["made"]) == ({"kind": "own", "more": "1"}, "here")
    assert model.status.name == "READY"
    assert (store / "others").is_dir()
    assert open_detector(f"runs:/{run.info.run_id}/detector", "cpu").info.detector == "gated"


@pytest.mark.parametrize("uri", ["models:/diffguard-tiny@champion", "runs:/0123/detector"])
@pytest.mark.parametrize("named", [None, "sqlite:///elsewhere.db"])
def test_looking_into_a_store_that_is_not_there_makes_none(uri, named, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {} if named is None else {"MLFLOW_TRACKING_URI": named}
    command = [sys.executable, "-m", "diffguard.cli.main", "score", "x.png", "--detector", uri]
    (tmp_path / "x.png").write_bytes(b"")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert f"error: {uri}: there is no store {tmp_path}/" in line
    assert ("MLFLOW_TRACKING_URI is not set" in line) == (named is None)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
