import numpy as np
import pytest

from diffguard.calibration import accept_threshold
from diffguard.errors import SettingError


def test_new_ind_images_are_accepted_as_promised():
    rng = np.random.default_rng(0)
    accepted = [np.mean(rng.normal(size=200) <= accept_threshold(rng.normal(size=99), 0.9)) for _ in range(2000)]
    assert np.mean(accepted) == pytest.approx(0.9, abs=0.005)


def test_too_few_images_is_an_error_that_says_how_many_are_needed():
    with pytest.raises(SettingError, match="at least 19 calibration images, there are 18"):
        accept_threshold(np.arange(18), 0.95)
    assert accept_threshold(np.arange(19), 0.95) == 18
