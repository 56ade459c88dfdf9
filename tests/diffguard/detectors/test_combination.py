import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from diffguard.calibration.conformal import Conformal
from diffguard.calibration.zscores import calibration_log_p_values, calibration_z_scores, log_p_values, z_scores
from diffguard.detectors.combination import Combined, fit_combination
from diffguard.errors import DataError, SettingError
from diffguard.settings import Combination, parse_settings

some = st.lists(st.integers(-6, 6), min_size=2, max_size=40).map(lambda each: np.array(each, float))
KINDS = [
    Combination(kind="z-sum", of=("a", "b")),
    Combination(kind="fisher", of=("a", "b")),
    Combination(kind="maximum", of=("a", "b")),
    Combination(kind="residual", of=("a", "b")),
    Combination(kind="cascade", of=("a", "b"), loss=0.01),
]
BEST = Combination(kind="best", of=("a", "b"))


def draw(rng, count, shift=0.0):
    """Scores of two detectors that have something in common."""
    common = rng.normal(shift, 1, size=count)
    return {"a": common + rng.normal(size=count), "b": 3 * common + rng.normal(shift, 1, size=count)}


def fitted(settings, seed=0, count=120):
    rng = np.random.default_rng(seed)
    return fit_combination(settings, draw(rng, count), (draw(rng, 60), {"near": draw(rng, 50, 1.5)}))


@settings(deadline=None)
@given(calibration=some, scores=st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_z_scores_keep_the_order_and_above_the_range_strictly(calibration, scores):
    scores = np.sort(scores)
    z = z_scores(calibration, scores)
    assert np.isfinite(z).all()
    assert (np.diff(z) >= 0).all()
    above = np.unique(scores[scores > calibration.max()].round(3))
    assert (np.diff(z_scores(calibration, above)) > 0).all()


def test_within_the_range_they_are_normal_quantiles_of_mid_ranks():
    assert z_scores([1, 2, 2, 4], [2.0, 3.0, 4.0]) == pytest.approx(norm.isf([2.5 / 5, 1.5 / 5, 1 / 5]))
    rng = np.random.default_rng(0)
    z = z_scores(rng.normal(size=4000), rng.normal(size=4000))
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=0.06), pytest.approx(1, abs=0.04))


def test_above_the_range_the_tail_is_exponential_with_the_mean_excess_of_the_largest_tenth():
    calibration = np.arange(30.0)  # the largest tenth is 27, 28, 29 over 26: mean excess 2
    assert log_p_values(calibration, [29.0 + 2 * 5]) == pytest.approx(np.log(0.5 / 31) - 5)
    assert np.isfinite(z_scores(calibration, [1e7])).all()
    assert z_scores(calibration, [np.inf]) == np.inf
    # Of scores that are all one the next that differs counts.
    assert log_p_values([0.0] * 8 + [3.0] * 4, [6.0]) == pytest.approx(np.log(0.5 / 13) - 1)


@settings(deadline=None)
@given(calibration=some)
def test_calibration_images_are_ranked_among_the_others(calibration):
    n = len(calibration)
    one_by_one = [log_p_values(np.delete(calibration, at), calibration[at : at + 1])[0] for at in range(n)]
    one_by_one += np.log(n / (n + 1))  # over as many as a new image's rank
    assert calibration_log_p_values(calibration) == pytest.approx(one_by_one)
    assert calibration_z_scores(calibration) == pytest.approx(norm.isf(np.exp(one_by_one)))


@pytest.mark.parametrize("settings", KINDS[:4], ids=lambda each: each.kind)
def test_calibration_scores_are_those_of_a_fit_without_the_image(settings):
    rng = np.random.default_rng(1)
    calibration = {name: each.round(1) for name, each in draw(rng, 25).items()}
    found = fit_combination(settings, calibration).score_calibration()
    for at in range(25):
        others = fit_combination(settings, {name: np.delete(each, at) for name, each in calibration.items()})
        one = {name: each[at : at + 1] for name, each in calibration.items()}
        log_p = [log_p_values(others.calibration[name], one[name]) + np.log(25 / 26) for name in "ab"]
        expected = others.score(one) if settings.kind == "residual" else others.fuse(np.stack(log_p))
        assert found[at] == pytest.approx(expected[0], abs=1e-9)


@pytest.mark.parametrize("settings", KINDS[:3], ids=lambda each: each.kind)
@pytest.mark.parametrize("images", [99, 160])
def test_a_fusion_keeps_the_promise_of_calibration(settings, images):
    rng, rejected = np.random.default_rng(6), {0.05: [], 0.1: []}
    for _ in range(500):
        fused = fit_combination(settings, draw(rng, images))
        new, calibration = fused.score(draw(rng, 300)), fused.score_calibration()
        for alpha, each in rejected.items():
            decision = Conformal.fit(calibration, np.zeros(images), alpha)
            each.append(decision.rejects(new, np.zeros(300)).mean())
    for alpha, each in rejected.items():
        error = np.std(each) / np.sqrt(len(each))
        assert alpha - 0.006 - 3 * error < np.mean(each) < alpha + 2 * error


def test_a_single_different_control_makes_no_line():
    control, scores = np.array([0.0, 0.0, 0.0, 5.0]), np.array([1.0, 2.0, 3.0, 60.0])
    combined = fit_combination(KINDS[3], {"a": scores, "b": control})
    assert combined.line == pytest.approx((2.0, 11.6))
    assert combined.score_calibration()[3] == pytest.approx(58.0)


def test_fusions_are_what_they_are_called():
    members = {"a": np.array([0.3, 5.0]), "b": np.array([-2.0, 4.0])}
    found = {settings.kind: fitted(settings) for settings in KINDS}
    calibration = found["z-sum"].calibration
    z = np.stack([z_scores(calibration[name], members[name]) for name in "ab"])
    assert found["z-sum"].score(members) == pytest.approx(z.sum(axis=0))
    assert found["maximum"].score(members) == pytest.approx(z.max(axis=0), abs=1e-4)
    assert found["fisher"].score(members) == pytest.approx(-2 * norm.logsf(z).sum(axis=0))
    slope, intercept = np.polyfit(calibration["b"], calibration["a"], 1)
    assert found["residual"].score(members) == pytest.approx(members["a"] - intercept - slope * members["b"])


@pytest.mark.parametrize("settings", KINDS[:3], ids=lambda each: each.kind)
def test_a_fusion_rises_with_each_member_whatever_their_units(settings):
    combined = fitted(settings)
    grid = np.linspace(-8, 12, 60)
    assert (np.diff(combined.score({"a": grid, "b": np.zeros(60)})) >= 0).all()
    scaled = {name: np.exp(each / 4) for name, each in combined.calibration.items()}
    inside = {name: each[:20] for name, each in combined.calibration.items()}
    other = fit_combination(settings, scaled).score({name: np.exp(each / 4) for name, each in inside.items()})
    assert other == pytest.approx(combined.score(inside))


@pytest.mark.parametrize("settings", [*KINDS, BEST], ids=lambda each: each.kind)
def test_a_combination_comes_back_from_json_with_its_calibration_scores(settings):
    combined = fitted(settings)
    again = Combined.from_json(json.loads(json.dumps(combined.to_json(), allow_nan=False)), combined.calibration)
    rng = np.random.default_rng(7)
    members = draw(rng, 30)
    assert (again.score(members) == combined.score(members)).all()
    assert (again.score_calibration() == combined.score_calibration()).all()
    assert again.settings == settings
    assert again.to_json() == combined.to_json()


@pytest.mark.parametrize("settings", KINDS, ids=lambda each: each.kind)
def test_what_is_missing_or_no_number_is_an_error(settings):
    combined = fitted(settings)
    with pytest.raises(DataError, match="scores of b are missing"):
        combined.score({"a": np.zeros(2)})
    with pytest.raises(DataError, match="a: 1 of 2 scores are not a number"):
        combined.score({"a": np.array([np.nan, 0.0]), "b": np.zeros(2)})
    with pytest.raises(DataError, match="calibration scores of b are missing"):
        fit_combination(settings, {"a": np.zeros(2)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mean", "of": ["a", "b"]}, "kind"),
        ({"kind": "z-sum", "of": ["a"]}, "of: "),
        ({"kind": "z-sum", "of": ["a", "a"]}, "of: a is there twice"),
        ({"kind": "residual", "of": ["a", "b", "c"]}, "of: a residual is of 2 rows, not 3"),
        ({"kind": "cascade", "of": ["a", "b"]}, "loss is needed by a cascade"),
        ({"kind": "fisher", "of": ["a", "b"], "loss": 0.1}, "loss is needed by a cascade, and only there"),
        ({"kind": "best", "of": ["a", "b"], "loss": 0.1}, "loss is needed by a cascade, and only there"),
        ({"kind": "best", "of": ["a", "b"], "confidence": 1.0}, "confidence: "),
        ({"kind": "z-sum", "of": ["a", "b"], "confidence": 0.95}, "confidence is a setting of a cascade or best, and"),
    ],
)
def test_a_wrong_combination_is_named(values, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(Combination, values, "params.yaml")


def test_settings_that_were_written_before_there_was_a_confidence_stay_as_they_are():
    plain = Combination(kind="cascade", of=("a", "b"), loss=0.01)
    assert plain.model_dump(mode="json") == {"kind": "cascade", "of": ["a", "b"], "loss": 0.01}
    assert Combination.model_validate(plain.model_dump()) == plain
    strict = plain.model_copy(update={"confidence": 0.99})
    assert Combination.model_validate(strict.model_dump()).confidence == 0.99
