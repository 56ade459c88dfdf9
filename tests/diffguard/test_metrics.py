import numpy as np
import pytest
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

from diffguard.metrics import (
    METRICS,
    bootstrap_weights,
    detection_metrics,
    evaluate_scores,
    resample_scores,
    weighted_metrics,
)


@pytest.mark.parametrize("decimals", [8, 1, 0])
def test_metrics_are_scikit_learns_with_and_without_ties(decimals):
    rng = np.random.default_rng(0)
    ind, ood = rng.normal(size=300).round(decimals), rng.normal(1, 1, size=170).round(decimals)
    is_ind, confidence = np.r_[np.ones(300), np.zeros(170)], -np.r_[ind, ood]
    found = detection_metrics(ind, ood)
    fpr, tpr, _ = roc_curve(is_ind, confidence, drop_intermediate=False)
    precision_in, recall_in, _ = precision_recall_curve(is_ind, confidence)
    precision_out, recall_out, _ = precision_recall_curve(1 - is_ind, -confidence)
    assert found["auroc"] == pytest.approx(roc_auc_score(is_ind, confidence), abs=1e-12)
    assert found["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
    assert found["aupr_in"] == pytest.approx(auc(recall_in, precision_in), abs=1e-12)
    assert found["aupr_out"] == pytest.approx(auc(recall_out, precision_out), abs=1e-12)


def test_a_weighting_is_the_sample_with_repeats():
    rng = np.random.default_rng(1)
    ind, ood = rng.normal(size=40).round(1), rng.normal(1, 1, size=30).round(1)
    weights_ind, weights_ood = bootstrap_weights(rng, 40, 20), bootstrap_weights(rng, 30, 20)
    found = weighted_metrics(ind, ood, weights_ind, weights_ood)
    for draw in range(21):
        repeated = detection_metrics(
            np.repeat(ind, weights_ind[draw].astype(int)), np.repeat(ood, weights_ood[draw].astype(int))
        )
        for metric in METRICS:
            assert found[metric][draw] == pytest.approx(repeated[metric], abs=1e-12)


def test_interval_covers_the_true_auroc_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        found = evaluate_scores([rng.normal(size=80)], {"a": [rng.normal(1, 1, size=80)]}, {}, draws=300)
        covered += found["a"]["auroc"]["low"] <= 0.7602 <= found["a"]["auroc"]["high"]  # Phi(1 / sqrt 2)
    assert 88 <= covered <= 100


def test_groups_are_means_and_seeds_are_pooled():
    rng = np.random.default_rng(3)
    ind = [rng.normal(size=50) for _ in range(3)]
    ood = {name: [rng.normal(shift, 1, size=40) for _ in range(3)] for name, shift in (("a", 1), ("b", 2))}
    found = evaluate_scores(ind, ood, {"near": ["a", "b"], "far": []}, draws=100)
    assert set(found) == {"a", "b", "near"}
    assert found["near"]["n_ood"] == 80
    for metric in METRICS:
        assert found["near"][metric]["value"] == pytest.approx(
            (found["a"][metric]["value"] + found["b"][metric]["value"]) / 2
        )
        assert found["a"][metric]["value"] == pytest.approx(np.mean(found["a"][metric]["per_seed"]))
        assert found["a"][metric]["low"] < found["a"][metric]["value"] < found["a"][metric]["high"]


def test_a_difference_is_of_the_same_draws_and_its_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered, narrower = 0, 0
    for _ in range(100):
        first = rng.normal(size=80), rng.normal(1, 1, size=80)
        second = [each + rng.normal(size=80) for each in first]  # AUROC Phi(1/2) in place of Phi(1 / sqrt 2)
        found = [resample_scores([i], {"a": [o]}, {}, draws=300) for i, o in (first, second)]
        difference = found[0].difference(found[1])["a"]["auroc"]
        values = [each.summary()["a"]["auroc"] for each in found]
        assert difference["value"] == pytest.approx(values[0]["value"] - values[1]["value"])
        covered += difference["low"] <= 0.7602 - 0.6915 <= difference["high"]
        narrower += difference["high"] - difference["low"] < sum(each["high"] - each["low"] for each in values)
    assert 88 <= covered <= 100
    assert narrower == 100


def test_a_detector_differs_from_itself_by_nothing():
    rng = np.random.default_rng(5)
    ind, ood = [rng.normal(size=30) for _ in range(2)], {"a": [rng.normal(size=20) for _ in range(2)]}
    found = resample_scores(ind, ood, {"near": ["a"]}, draws=100)
    for groups in found.difference(resample_scores(ind, ood, {"near": ["a"]}, draws=100)).values():
        for each in groups.values():
            assert each == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_fewer_metrics_and_another_confidence_are_of_the_same_draws():
    rng = np.random.default_rng(5)
    scores = [(rng.normal(size=60), {"a": [rng.normal(1, 1, size=50)]}) for _ in range(2)]
    whole, other = (resample_scores([ind], ood, {}, draws=200) for ind, ood in scores)
    one, same = (resample_scores([ind], ood, {}, draws=200, metrics=("auroc",)) for ind, ood in scores)
    assert one.by_seed["a"].keys() == {"auroc"}
    assert (one.by_seed["a"]["auroc"] == whole.by_seed["a"]["auroc"]).all()
    wide, narrow = (whole.difference(other, confidence=confidence)["a"]["auroc"] for confidence in (0.95, 0.5))
    assert one.difference(same, ("auroc",))["a"]["auroc"] == wide
    drawn = whole.by_seed["a"]["auroc"][0, 1:] - other.by_seed["a"]["auroc"][0, 1:]
    assert (narrow["low"], narrow["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.25, 0.75])))
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]
