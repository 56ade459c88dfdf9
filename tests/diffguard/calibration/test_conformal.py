import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from diffguard.calibration.conformal import (
    Conformal,
    accept_threshold,
    conformal_p_values,
    needed_images,
    promised_rejection,
)
from diffguard.errors import DataError, SettingError

tied = st.lists(st.integers(-5, 5), min_size=1, max_size=60)
rates = st.sampled_from([0.01, 0.05, 0.1, 0.2, 1 - 0.9, 1 - 0.95, 0.5])


def test_new_ind_images_are_accepted_as_guaranteed():
    rng = np.random.default_rng(0)
    accepted = [np.mean(rng.normal(size=200) <= accept_threshold(rng.normal(size=99), 0.9)) for _ in range(2000)]
    assert np.mean(accepted) == pytest.approx(0.9, abs=0.005)


def test_too_few_images_is_an_error_that_says_how_many_are_needed():
    with pytest.raises(SettingError, match="at least 19 calibration images, there are 18"):
        accept_threshold(np.arange(18), 0.95)
    assert accept_threshold(np.arange(19), 0.95) == 18
    with pytest.raises(SettingError, match=r"0\.95 needs at least 19 calibration images, there are 18"):
        Conformal.fit(np.arange(18), np.zeros(18, int), alpha=1 - 0.95)


@pytest.mark.parametrize("call", [accept_threshold, conformal_p_values])
def test_what_is_no_number_is_an_error(call):
    with pytest.raises(DataError, match="calibration: 1 of 3 scores are not a number"):
        call([1.0, np.nan, 2.0], 0.5)
    with pytest.raises(DataError, match="scores: 1 of 2"):
        Conformal.fit(np.arange(19), np.zeros(19, int), alpha=0.1).rejects([np.nan, 1.0], [0, 0])


@settings(deadline=None)
@given(scores=tied, alpha=rates)
def test_leaving_one_out_keeps_the_guarantee_whatever_the_ties(scores, alpha):
    """Of n + 1 exchangeable scores each is the new one as often as any other: the guarantee, counted out."""
    scores = np.array(scores, float)
    p = np.array([conformal_p_values(np.delete(scores, at), scores[at])[0] for at in range(len(scores))])
    promised = promised_rejection(len(scores) - 1, alpha)
    assert np.mean(p <= alpha + 1e-12) <= promised + 1e-12
    assert promised <= alpha + 1e-12
    if len(set(scores)) == len(scores):
        assert np.mean(p <= alpha + 1e-12) == pytest.approx(promised)


@settings(deadline=None)
@given(calibration=tied, scores=st.lists(st.floats(-9, 9), min_size=2, max_size=20))
def test_a_higher_score_never_has_a_higher_p_value(calibration, scores):
    p = conformal_p_values(calibration, np.sort(scores))
    assert (np.diff(p) <= 0).all()
    assert ((p > 0) & (p <= 1)).all()


def test_randomized_p_values_are_uniform_though_scores_tie():
    rng = np.random.default_rng(1)
    found = [conformal_p_values(rng.integers(3, size=7), rng.integers(3, size=1), rng)[0] for _ in range(4000)]
    assert kstest(found, "uniform").pvalue > 0.01
    plain = [conformal_p_values(rng.integers(3, size=7), rng.integers(3, size=1))[0] for _ in range(4000)]
    assert kstest(plain, "uniform").pvalue < 1e-6


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("n", [99, 160])
def test_coverage_and_its_spread_are_those_of_the_beta_distribution(alpha, n):
    """Given the calibration images the rate is Beta(k, n + 1 - k), k = floor(alpha (n + 1))."""
    rng = np.random.default_rng(2)
    # The true rate at a threshold u of uniform scores is 1 - u.
    rate = np.array([1 - Conformal.fit(rng.random(n), np.zeros(n, int), alpha).threshold() for _ in range(4000)])
    k = round(promised_rejection(n, alpha) * (n + 1))
    assert rate.mean() == pytest.approx(k / (n + 1), abs=4 * rate.std() / np.sqrt(len(rate)))
    assert rate.std() == pytest.approx(np.sqrt(k * (n + 1 - k) / (n + 2)) / (n + 1), rel=0.06)


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 3)), min_size=99, max_size=140),
    new=st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 4)), min_size=1, max_size=20),
    alpha=st.sampled_from([0.01, 0.05, 0.1, 1 - 0.9, 1 - 0.95, 0.3]),
)
def test_a_decision_is_the_p_value_against_alpha_and_the_score_against_the_threshold(images, new, alpha):
    scores, predicted = np.array(images).T
    conformal = Conformal.fit(scores, predicted, alpha)
    new_scores, new_predicted = np.array(new).T
    rejected = conformal.rejects(new_scores, new_predicted)
    assert (rejected == (conformal.p_values(new_scores, new_predicted) <= conformal.alpha)).all()
    assert rejected.tolist() == [score > conformal.threshold(label) for score, label in new]


def test_a_class_is_judged_by_itself_where_it_has_enough_images():
    rng = np.random.default_rng(3)
    predicted = np.repeat([0, 1, 2, 3], [60, 19, 18, 3])
    scores = rng.normal(size=100) + 10 * predicted
    conformal = Conformal.fit(scores, predicted, alpha=0.05)
    assert needed_images(0.05) == 19
    assert conformal.by_class.keys() == {0, 1}
    assert conformal.pooled_classes(5) == [2, 3, 4]
    assert conformal.thresholds == {0: accept_threshold(scores[:60], 0.95), 1: scores[60:79].max()}
    # The others are judged among each other, not among those that have their own.
    assert conformal.threshold(2) == conformal.threshold(4) == conformal.threshold() == scores[79:].max()
    assert conformal.rejects([9.0, 9.0, 9.0], [0, 1, 2]).tolist() == [True, False, False]
    assert conformal.p_values([9.0, 99.0], [0, 2]).tolist() == [1 / 61, 1 / 22]
    assert conformal.promised([0, 1, 2]) == pytest.approx((3 / 61 + 1 / 20 + 1 / 22) / 3)
    together = Conformal.fit(scores, predicted, alpha=0.05, conditional=False)
    assert together.by_class == {}
    assert together.threshold() == accept_threshold(scores, 0.95)
    assert together.rejects([9.0, 9.0, 9.0], [0, 1, 2]).tolist() == [False, False, False]


def test_classes_with_the_fewest_images_join_others_that_are_too_few():
    scores, predicted = np.arange(100.0), np.repeat([0, 1, 2, 3], [50, 25, 20, 5])
    joined = Conformal.fit(scores, predicted, alpha=0.05)
    assert joined.by_class.keys() == {0, 1}
    assert joined.pooled.tolist() == scores[75:].tolist()
    # A class of no calibration image asks for no company.
    none_left = Conformal.fit(scores[:95], predicted[:95], alpha=0.05)
    assert none_left.by_class.keys() == {0, 1, 2}
    assert none_left.threshold(3) == accept_threshold(scores[:95], 0.95)


@pytest.mark.parametrize("images", [150, 250])
def test_the_guarantee_holds_where_some_classes_are_pooled_though_their_scores_differ(images):
    """One common and two rare classes, too few for their own threshold in most draws."""
    rng, rejected, promised, mixed = np.random.default_rng(5), [], [], 0
    for _ in range(1500):
        labels, new = (rng.choice(3, size, p=[0.84, 0.08, 0.08]) for size in (images, 200))
        conformal = Conformal.fit(rng.normal(size=images) + 2 * (labels > 0), labels, alpha=0.05)
        mixed += 0 < len(conformal.by_class) < 3
        rejected.append(conformal.rejects(rng.normal(size=200) + 2 * (new > 0), new).mean())
        promised.append(conformal.promised(new))
    assert mixed > 700
    error = np.std(rejected) / np.sqrt(len(rejected))
    assert np.mean(rejected) == pytest.approx(np.mean(promised), abs=4 * error)
    assert np.mean(rejected) < 0.05 + 2 * error


def test_the_guarantee_holds_for_each_class_though_their_scores_differ():
    rng = np.random.default_rng(4)
    rejected = {label: [] for label in (0, 1)}
    for _ in range(1000):
        labels, new = rng.integers(2, size=160), rng.integers(2, size=40)
        conformal = Conformal.fit(rng.normal(size=160) + 3 * labels, labels, alpha=0.1)
        found = conformal.rejects(rng.normal(size=40) + 3 * new, new)
        for label, each in rejected.items():
            each.extend(found[new == label])
    for each in rejected.values():
        assert 0.08 <= np.mean(each) <= 0.1 + 0.006
