"""Images that are made on the spot, in gray as the digits are and in colour at any size."""

from itertools import islice

import numpy as np
import pytest

from tasks.sources.settings import Noise, Patches
from tasks.sources.synthetic import noise, patches


def test_without_a_size_they_are_written_as_ever():
    assert Patches(kind="patches").model_dump() == {"kind": "patches"}
    assert Noise(kind="noise", size=32).model_dump() == {"kind": "noise", "size": 32}


def drawn(source, count, **options):
    return [image for _, image in islice(source(np.random.default_rng(0), **options), count)]


@pytest.mark.parametrize("source", [patches, noise])
def test_without_a_size_they_are_as_the_digits_are(source):
    for image in drawn(source, 9):
        assert image.shape == (8, 8)
        assert set(np.unique(image)) <= {round(level * 255 / 16) for level in range(17)}


@pytest.mark.parametrize("source", [patches, noise])
def test_with_a_size_they_are_in_colour_and_differ(source):
    images = drawn(source, 9, size=32)
    assert {(image.shape, image.dtype) for image in images} == {((32, 32, 3), np.dtype(np.uint8))}
    assert len({image.tobytes() for image in images}) == 9
    assert any((image[..., 0] != image[..., 2]).any() for image in images)
    assert np.ptp(np.stack(images)) > 200


def test_noise_is_of_three_kinds_in_turn_at_any_size():
    def roughness(image):
        return np.abs(np.diff(image.astype(float), axis=0)).mean()

    uniform, grating, blobs = (drawn(noise, 90, size=32)[kind::3] for kind in range(3))
    rough, waves, smooth = (np.mean([roughness(image) for image in images]) for images in (uniform, grating, blobs))
    assert rough > 2 * waves > 2 * smooth
