"""What a training says of its denoiser: a curve of accuracy, of the rows it is meant for, and a sentence."""

import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from small_project import work_in

import tasks.train.meter
from diffguard.engine import Request, score_batch
from diffguard.training.previews import accuracy_as_classifier
from tasks.config.run import open_run
from tasks.models.checks import open_model
from tasks.train.meter import Meter, open_meter

ROWS = {
    "label-gain": {"stop": 7, "guidance": {"kind": "label"}, "distance": "label-gain"},
    "denoiser-posterior": {"stop": 3, "guidance": {"kind": "all-labels"}, "distance": "denoiser-posterior"},
    "activations": {"stop": 1, "guidance": {"kind": "none"}, "distance": "denoiser-activations"},
}


@pytest.fixture
def run(project, monkeypatch):
    work_in(monkeypatch, project)
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["score"]["variants"] = {**params["score"]["variants"], **ROWS}
    monkeypatch.setattr(tasks.config.project, "ROOT", project)
    written = path.read_text()
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    yield open_run()
    path.write_text(written)


def test_it_measures_the_rows_of_errors_on_validation_images(run, monkeypatch):
    meter = open_meter(run, 0)
    assert list(meter.rows) == ["label-gain", "denoiser-posterior"]
    assert (len(meter.labels), len(meter.near)) == (12, 6)
    denoiser = open_model(run, run.model(0, "denoiser"))
    values = meter.measure(denoiser)
    assert values == {"validation/accuracy_as_classifier": meter.accuracy}
    assert meter.accuracy == accuracy_as_classifier(denoiser, meter.images.float() / 255, meter.labels)
    asked = meter.measure(denoiser, with_rows=True)
    monkeypatch.setattr(tasks.train.meter, "LONG_SECONDS", 0)
    values = meter.measure(denoiser)
    assert asked == values
    assert meter.measure(denoiser, with_rows=False).keys() == {"validation/accuracy_as_classifier"}
    assert set(values) == {
        "validation/accuracy_as_classifier",
        "validation/near_auroc/label-gain",
        "validation/near_auroc/denoiser-posterior",
    }
    images = torch.cat([meter.images, meter.near]).float() / 255
    requests = [Request(meter.classifier, variant) for variant in meter.rows.values()]
    for name, scored in zip(meter.rows, score_batch(images, denoiser, requests), strict=True):
        expected = roc_auc_score([0] * 12 + [1] * 6, scored.score)
        assert values[f"validation/near_auroc/{name}"] == pytest.approx(expected)


def test_without_a_classifier_it_measures_the_accuracy_alone(run, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.train.meter, "LONG_SECONDS", 0)
    monkeypatch.setattr(type(run), "model", lambda self, seed, name: tmp_path / name)
    meter = open_meter(run, 0)
    assert meter.classifier is None
    monkeypatch.undo()
    assert list(meter.measure(open_model(run, run.model(0, "denoiser")))) == ["validation/accuracy_as_classifier"]


@pytest.mark.parametrize(
    ("accuracy", "meaning"),
    [(0.1, "knows nothing of its classes"), (0.5, "knows its classes a little"), (0.8, "well enough to guard with")],
)
def test_it_says_what_an_accuracy_means(accuracy, meaning):
    labels = torch.arange(10)
    meter = Meter(torch.empty(10, 3, 8, 8), labels, torch.empty(0, 3, 8, 8), None, {}, accuracy)
    assert meaning in str(meter)
    assert f"gives {100 * accuracy:.0f} % of 10 validation images their label (chance: 10 %)" in str(meter)
