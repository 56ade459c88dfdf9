"""What users import, by the names that stay: the package itself, and names that stored files have."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diffguard
from diffguard.deploy.bundle import INFO_FILE, load_bundle, save_bundle
from diffguard.detectors.complexity import HighFrequency
from diffguard.models.classifiers import load_classifier, save_classifier
from diffguard.utils.hashing import hash_values
from diffguard.utils.importing import import_object


def test_every_name_is_there_and_no_other():
    for name in diffguard.__all__:
        assert getattr(diffguard, name) is not None
    assert set(diffguard.__all__) <= set(dir(diffguard))
    with pytest.raises(AttributeError, match="module 'diffguard' has no attribute 'nothing'"):
        _ = diffguard.nothing


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse(Path(diffguard.__file__).read_text(encoding="utf-8"))
    told = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("diffguard")
        for alias in node.names
    }
    assert {**told, **diffguard._WHERE} == told
    assert told.keys() == set(diffguard.__all__)


@pytest.mark.parametrize("options", [["--help"], ["--version"], ["score", "--help"], ["serve", "--help"]])
def test_help_does_not_wait_for_torch(options):
    code = f"""if True:
        import sys
        from diffguard.cli.main import main
        try:
            main({options!r})
        finally:
            slow = {{"torch", "diffusers", "pytorch_ood", "mlflow"}} & sys.modules.keys()
            assert not slow, slow
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_classifier_of_a_former_version_is_loaded(classifier, images, tmp_path):
    save_classifier(classifier, tmp_path / "now.safetensors")
    with safe_open(tmp_path / "now.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["class"] == "diffguard.models.classifiers:ConvClassifier"
    metadata["class"] = "diffguard.classifiers:ConvClassifier"
    save_file(classifier.state_dict(), tmp_path / "former.safetensors", metadata)
    loaded = load_classifier(tmp_path / "former.safetensors")
    assert torch.equal(loaded(images), classifier(images))


def test_a_bundle_of_a_former_version_is_loaded(made, tmp_path):
    save_bundle(made.detector("complexity"), tmp_path / "bundle")
    path = tmp_path / "bundle" / INFO_FILE
    written = json.loads(path.read_text())
    row = written["info"]["baselines"]["complexity"]
    assert row["detector"] == "diffguard.detectors:HighFrequency"
    row["detector"] = "diffguard.complexity:HighFrequency"
    written["hash"] = hash_values({"info": written["info"], "files": written["files"]})
    path.write_text(json.dumps(written))
    loaded = load_bundle(tmp_path / "bundle", "cpu")
    image = loaded.prepare(loaded.example)[None]
    assert loaded.decide(image)[0].score == pytest.approx(float(HighFrequency().predict(image)))


def test_settings_may_still_have_a_former_name():
    assert import_object("diffguard.complexity:HighFrequency") is HighFrequency
