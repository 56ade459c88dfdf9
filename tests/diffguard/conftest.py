"""Tiny models with fixed random weights; nothing here is trained."""

import pytest
import torch
from small_detector import tiny_classifier, tiny_denoiser

from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.pixel import PixelDenoiser


@pytest.fixture(scope="session")
def denoiser() -> PixelDenoiser:
    return tiny_denoiser()


@pytest.fixture(scope="session")
def classifier() -> ConvClassifier:
    return tiny_classifier()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))
