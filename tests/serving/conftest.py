"""A small bundle, and its decisions in this process."""

import pytest
from small_detector import Made, tiny_classifier, tiny_denoiser

from diffguard.bundle import load_bundle, save_bundle


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
