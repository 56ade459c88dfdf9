"""What monitoring says of images: false alarms as rare as they should be, though calibration sets are small."""

import numpy as np
import pytest
from scipy.stats import kstest

from diffguard.calibration.conformal import Conformal
from diffguard.calibration.drift import rejection, uniformity
from diffguard.errors import DataError

CLASSES = 4
REPEATS = 300


def draw(rng, images, shift=0.0):
    """Scores whose distribution depends on the predicted class, the last two of which are rare and differ most."""
    labels = rng.choice(CLASSES, images, p=[0.45, 0.35, 0.1, 0.1])
    return rng.normal(labels**2 * 0.5 + shift, 1 + 0.3 * labels), labels


@pytest.fixture(scope="module", params=[False, True], ids=["pooled", "by class"])
def repeated(request):
    """Of images that are all InD: rejection, uniformity, and p-values, once for each of many calibration sets."""
    rng, found = np.random.default_rng(1), []
    for _ in range(REPEATS):
        fitted = Conformal.fit(*draw(rng, 160), alpha=0.05, conditional=request.param)
        scores, labels = draw(rng, 1000)
        values = fitted.p_values(scores, labels, np.random.default_rng(0))
        found.append((rejection(fitted, scores, labels), uniformity(fitted, scores, labels), values))
    return found


def test_a_guarantee_that_is_kept_is_seldom_called_broken(repeated):
    by_interval = np.mean([each.low > each.expected for each, _, _ in repeated])
    assert by_interval > 0.08  # of the images alone: what calibration sets do by chance would be called broken
    assert np.mean([each.is_above for each, _, _ in repeated]) < 0.06
    assert np.mean([each.is_below for each, _, _ in repeated]) < 0.06


def test_kolmogorov_smirnov_allows_for_the_calibration_set(repeated):
    found = np.array([each.p_value for _, each, _ in repeated])
    for level in (0.05, 0.2, 0.5):
        # Three standard deviations more at most; on the safe side, since p-values of few images are no Brownian bridge.
        assert level / 3 < (found < level).mean() < level + 3 * np.sqrt(level * (1 - level) / REPEATS)
    alone = [kstest(values, "uniform").pvalue for _, _, values in repeated]
    assert np.mean(np.array(alone) < 0.05) > 0.2


def test_a_shift_breaks_the_guarantee_and_uniformity():
    rng = np.random.default_rng(2)
    fitted = Conformal.fit(*draw(rng, 160), alpha=0.05)
    moved = draw(rng, 1000, shift=2.0)
    found = rejection(fitted, *moved)
    assert found.is_above
    assert not found.is_below
    assert found.rate > found.low > found.allowed > found.expected
    uniform = uniformity(fitted, *moved)
    assert uniform.p_value < 1e-6
    assert uniform.counts.sum() == 1000
    assert uniform.counts[0] > 2 * uniform.counts[-1]


def test_the_first_of_twenty_bars_is_what_is_rejected_at_five_percent_where_nothing_ties():
    rng = np.random.default_rng(3)
    fitted = Conformal.fit(rng.normal(size=99), np.zeros(99), alpha=0.05)
    scores = rng.normal(0.5, 1, size=400)
    found, uniform = rejection(fitted, scores, np.zeros(400)), uniformity(fitted, scores, np.zeros(400))
    assert uniform.counts[0] == found.count > 20


def test_with_a_rate_that_was_seen_before_only_the_images_own_chance_counts():
    fitted = Conformal.fit(range(99), np.zeros(99), alpha=0.05)
    scores = [200.0] * 70 + [0.0] * 930
    assert not rejection(fitted, scores, np.zeros(1000)).is_above
    assert rejection(fitted, scores, np.zeros(1000), expected=0.05).is_above
    assert not rejection(fitted, scores, np.zeros(1000), expected=0.07).is_above
    assert rejection(fitted, scores, np.zeros(1000), expected=0.1).is_below


def test_ties_are_broken_at_random_and_always_alike():
    fitted = Conformal.fit(np.repeat([0.0, 1.0], 60), np.zeros(120), alpha=0.05)
    scores = np.repeat([0.0, 1.0], 200)
    first, second = (uniformity(fitted, scores, np.zeros(400), seed=5) for _ in range(2))
    assert first.statistic == second.statistic < 0.08
    assert (first.counts > 0).all()


@pytest.mark.parametrize("measure", [rejection, uniformity])
def test_no_images_and_no_numbers_are_errors(measure):
    fitted = Conformal.fit(range(99), np.zeros(99), alpha=0.05)
    with pytest.raises(DataError, match="there are none"):
        measure(fitted, [], [])
    with pytest.raises(DataError, match="1 of 2 scores are not a number"):
        measure(fitted, [1.0, np.nan], [0, 0])
