"""The grid of reconstructions: what a cell shows."""

import numpy as np
import pandas as pd
import pytest

from diffguard.calibration.conformal import Conformal
from tasks.evaluate.pictures import sample_grid
from tasks.score.store import Samples


@pytest.mark.parametrize(("difference", "times"), [(10, 16), (40, 4), (200, 1)])
def test_a_difference_is_brightened_by_a_whole_number(difference, times):
    shape = (1, 3, 32, 32)
    samples = Samples(["a"], np.zeros(shape, np.uint8), np.full(shape, difference, np.uint8), np.zeros(shape, np.uint8))
    table = pd.DataFrame({"id": ["a"], "dataset": ["x"], "predicted": [0], "score": [0.5]})
    picture = np.asarray(sample_grid(samples, table, ["cat"], Conformal.fit(range(99), [0] * 99, 0.05)))
    side, gap, top = 96, 6, 24
    reconstruction, shown = (
        picture[top : top + side, column * (side + gap) : column * (side + gap) + side] for column in (2, 3)
    )
    assert (reconstruction == difference).all()
    assert (shown == times * difference).all()


@pytest.mark.parametrize(("size", "side"), [(8, 96), (28, 84), (64, 128), (150, 150), (256, 192)])
def test_small_images_are_enlarged_by_a_whole_number_and_large_ones_made_smaller(size, side):
    images = np.zeros((1, 1, size, size), np.uint8)
    table = pd.DataFrame({"id": ["a"], "dataset": ["x"], "predicted": [0], "score": [0.5]})
    samples = Samples(["a"], images, images, images)
    picture = sample_grid(samples, table, ["cat"], Conformal.fit(range(99), [0] * 99, 0.05))
    assert picture.size == (4 * (side + 6) + 150, 24 + side + 6)
