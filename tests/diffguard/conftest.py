"""Tiny models with fixed random weights, nothing here is trained; a small bundle, and its decisions in this process."""

import json

import pytest
import torch
from small_detector import Made, tiny_classifier, tiny_denoiser

from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.images import to_picture
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.serving.requests import encode_image


@pytest.fixture(scope="session")
def denoiser() -> PixelDenoiser:
    return tiny_denoiser()


@pytest.fixture(scope="session")
def classifier() -> ConvClassifier:
    return tiny_classifier()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def made():
    return Made(tiny_classifier(), tiny_denoiser())


@pytest.fixture(scope="session")
def bundle(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "detector"
    save_bundle(made.detector("gated"), folder)
    return folder


@pytest.fixture(scope="session")
def detector(bundle):
    return load_bundle(bundle, "cpu")


@pytest.fixture
def own(bundle):
    """A detector that a test may spoil."""
    return load_bundle(bundle, "cpu", slots=8)


@pytest.fixture(scope="session")
def body(made):
    """Of a good request: three images."""
    return json.dumps({"images": [encode_image(to_picture(image)) for image in made.new[:3]]}).encode()
