"""Detectors of pytorch-ood as they are asked: no more looks of the classifier than they need, in parts that fit."""

import pytest
import torch
import yaml
from pytorch_ood.detector import KNN, EnergyBased, MaxLogit, MaxSoftmax

from diffguard.detectors.baselines import check_baseline, detect
from diffguard.models.classifiers.base import PART, predict_logits
from diffguard.models.classifiers.small import ConvClassifier, WhitenedClassifier
from diffguard.settings import Baseline
from tasks.config.project import ROOT

SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())["score"]["baselines"]
COUNT = 2 * PART + 5


class Looked(ConvClassifier):
    """Notes how many images it is given at a time."""

    def __init__(self):
        super().__init__(4, width=4)
        self.given = []

    def features(self, images):
        self.given.append(len(images))
        return super().features(images)


@pytest.fixture
def looked():
    torch.manual_seed(0)
    return Looked().eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_classifier_sees_images_in_parts(looked, images):
    whole = looked(images)
    looked.given.clear()
    assert torch.allclose(predict_logits(looked, images), whole, atol=1e-6)
    assert looked.given == [PART, PART, 5]
    assert predict_logits(looked, images[:0]).shape == (0, 4)


@pytest.mark.parametrize("kind", [MaxSoftmax, MaxLogit, EnergyBased])
def test_a_detector_of_logits_takes_those_that_are_there(looked, images, kind):
    logits, expected = predict_logits(looked, images), kind(looked).predict(images)
    looked.given.clear()
    assert torch.allclose(detect(kind(looked), images, logits), expected, atol=1e-6)
    assert looked.given == []


def test_any_other_detector_sees_the_images_in_parts(looked, images):
    detector = KNN(looked.features, k=3).fit_features(looked.features(images[:20]), torch.zeros(20))
    expected = detector.predict(images)
    looked.given.clear()
    assert torch.allclose(detect(detector, images, torch.empty(COUNT, 4)), expected, atol=1e-6)
    assert looked.given == [PART, PART, 5]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_detector_can_be_made_of_a_whitened_classifier(name):
    classifier = WhitenedClassifier(4, (8, 16, 16)).eval().requires_grad_(False)
    assert classifier(torch.rand(2, 3, 32, 32)).std() > 0
    check_baseline(name, Baseline(**SHIPPED[name]), classifier, (3, 32, 32))
