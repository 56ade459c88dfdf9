"""High-frequency energy against scipy's convolution, and where it is used."""

import numpy as np
import pytest
import torch
from pytorch_ood.api import Detector
from scipy.ndimage import convolve

from diffguard.detectors.complexity import HighFrequency
from diffguard.errors import DataError

KERNEL = np.outer([1, 2, 1], [1, 2, 1]) / 16


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (3, 5, 9), (4, 2, 2)])
def test_it_is_what_a_binomial_blur_takes_away(shape):
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    expected = []
    for image in images.double().numpy():
        blurred = [convolve(channel, KERNEL, mode="mirror") for channel in image]
        expected.append(((image - np.stack(blurred)) ** 2).mean())
    assert np.allclose(HighFrequency().predict(images), expected, rtol=1e-4)


def test_it_is_of_each_image_alone_and_rises_with_its_detail():
    detector = HighFrequency()
    assert isinstance(detector, Detector)
    assert not detector.requires_fit
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    ramp = torch.linspace(0, 1, 8).expand(8, 8)
    images = torch.stack([torch.full((8, 8), 0.7), ramp, board.float()])[:, None]
    scores = detector.predict(images)
    assert scores.argsort().tolist() == [0, 1, 2]
    assert scores[0] < 1e-12
    assert float(scores[2]) == pytest.approx(0.25)
    assert torch.equal(detector.predict(images[[2, 0]]), scores[[2, 0]])


@pytest.mark.parametrize("shape", [(3, 64), (3, 1, 1, 8), (3, 8, 8)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(DataError, match=r"takes images \[B, C, H, W\] of at least 2x2 pixels"):
        HighFrequency().predict(torch.zeros(shape))
