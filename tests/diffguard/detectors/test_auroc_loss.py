"""The loss of AUROC against the metrics, and its bound where the exact one is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, norm

from diffguard.detectors.auroc_loss import AurocLoss, Placements
from diffguard.metrics import detection_metrics

few = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda values: np.array(values, float))


@settings(deadline=None)
@given(ind=few, ood=few, data=st.data())
def test_it_is_the_difference_of_the_two_aurocs_seen_from_either_side(ind, ood, data):
    others = [np.array(data.draw(st.permutations(scores.tolist()))) for scores in (ind, ood)]
    loss = AurocLoss.of(Placements.of(ind, ood), Placements.of(*others))
    expected = detection_metrics(ind, ood)["auroc"] - detection_metrics(*others)["auroc"]
    assert loss.value == pytest.approx(expected)
    assert loss.ind.mean() == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("failures", [0, 1, 3, 10, 40])
def test_of_rare_images_that_lose_everything_it_is_the_exact_bound_of_their_rate(failures, confidence):
    """Clopper and Pearson's, which needs no assumption."""
    images = 4000
    ood = (np.arange(images) < failures).astype(float)
    loss = AurocLoss(ind=np.full(10, ood.mean()), ood=ood)
    exact = beta.ppf(confidence, failures + 1, images - failures)
    assert loss.upper(confidence, ind_unseen=False, ood_unseen=True) == pytest.approx(exact, rel=0.02)


def test_where_nothing_can_lose_there_is_nothing_to_bound():
    loss = AurocLoss(ind=np.zeros(10), ood=np.zeros(10))
    assert loss.upper(0.95, ind_unseen=False, ood_unseen=False) == 0
    unseen = [loss.upper(0.95, ind_unseen=ind, ood_unseen=ood) for ind, ood in ((1, 0), (0, 1), (1, 1))]
    assert 0.2 < unseen[0] == unseen[1] < unseen[2]


def test_with_more_images_it_comes_down_to_the_loss():
    rng = np.random.default_rng(0)
    ind, ood = rng.normal(0.1, 0.1, size=50), rng.normal(0.1, 0.1, size=70)
    loss = AurocLoss(ind - ind.mean() + ood.mean(), ood)
    bounds = [loss.upper(0.95, ind_unseen=True, ood_unseen=True, times=times) for times in (1, 10, 100, 1e6)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(loss.value, abs=1e-3)
    twice = AurocLoss(np.tile(loss.ind, 10), np.tile(loss.ood, 10))
    assert bounds[1] == pytest.approx(twice.upper(0.95, ind_unseen=True, ood_unseen=True), rel=0.01)


def test_the_bound_holds_as_often_as_it_says():
    """Two detectors of normal scores that have most in common, with AUROC Phi(1) and Phi(1 / sqrt(1.09))."""
    rng, held = np.random.default_rng(1), 0
    true = norm.cdf(1) - norm.cdf(1 / np.sqrt(1.09))
    for _ in range(400):
        first = rng.normal(size=90), rng.normal(np.sqrt(2), 1, size=120)
        second = [scores + rng.normal(0, 0.3, size=len(scores)) for scores in first]
        loss = AurocLoss.of(Placements.of(*first), Placements.of(*second))
        held += true <= loss.upper(0.9, ind_unseen=False, ood_unseen=False)
    assert 345 <= held <= 385
