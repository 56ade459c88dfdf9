"""Baselines of a run are fitted on the split train as by themselves, which is evaluated once for all of them."""

import pytest
import torch
import yaml
from small_project import write_params

from diffguard.detectors.baselines import detect, fit_baseline
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import predict_logits
from tasks.common.files import read_images
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.models.checks import check_models
from tasks.models.loaded import TrainBatches, load_models

NAMES = ("msp", "knn", "mahalanobis", "dice", "kl-matching", "react", "nac", "pixel-knn")


@pytest.fixture(scope="module")
def models(project):
    recorded = yaml.safe_load((ROOT / "params.yaml").read_text())["score"]["baselines"]

    def change(params):
        params["score"]["baselines"] = {name: recorded[name] for name in NAMES}

    write_params(project, change)
    return load_models(open_run(), 0, "cpu")


def test_scores_are_those_of_a_fit_on_images(models):
    network = models.classifiers["ordinary"]
    images = read_images(models.run.home, models.run.scored)
    logits = predict_logits(network, images)
    for name, row in models.run.params.score.baselines.items():
        alone = fit_baseline(name, row, network, TrainBatches(models), torch.device("cpu"))
        expected = detect(alone, images, logits)
        assert torch.equal(detect(models.detectors["ordinary", name], images, logits), expected), name


def test_features_of_the_train_split_are_evaluated_once(models, monkeypatch):
    network, evaluated = models.classifiers["ordinary"], []
    features = network.features
    monkeypatch.setattr(network, "features", lambda images: evaluated.append(len(images)) or features(images))
    views = models._views(network)
    assert views.keys() == {"features"}  # the logits are what one alone is fitted on
    assert sum(evaluated) == sum(len(labels) for _, labels in TrainBatches(models))


def test_one_that_does_not_suit_a_network_is_named_before_anything_runs(models, project):
    def change(params):
        params["score"]["baselines"] = {
            "layered": {"detector": "pytorch_ood.detector:ReAct", "sees": "maps", "layer": "nowhere"}
        }
        params["combine"] = {}

    write_params(project, change)
    with pytest.raises(SettingError, match=r"score\.baselines\.layered: .*nowhere"):
        check_models(open_run())
