import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from diffguard.calibration.conformal import Conformal
from diffguard.calibration.zscores import calibration_log_p_values, calibration_z_scores, log_p_values, z_scores
from diffguard.detectors.cascade import MOST_BINS, Bands, Cascade
from diffguard.detectors.combination import Combined, fit_combination
from diffguard.errors import DataError, SettingError
from diffguard.metrics import detection_metrics
from diffguard.settings import Combination, parse_settings

some = st.lists(st.integers(-6, 6), min_size=2, max_size=40).map(lambda each: np.array(each, float))
KINDS = [
    Combination(kind="z-sum", of=("a", "b")),
    Combination(kind="fisher", of=("a", "b")),
    Combination(kind="maximum", of=("a", "b")),
    Combination(kind="residual", of=("a", "b")),
    Combination(kind="cascade", of=("a", "b"), loss=0.01),
]


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


def test_a_cascade_ranks_cleared_under_undecided_under_rejected():
    combined = Cascade(KINDS[4], {"a": np.arange(99.0), "b": np.arange(99.0)}, band=(-0.5, 1.0))
    gate = np.array([10.0, 20.0, 50.0, 60.0, 70.0, 95.0, 400.0])
    second = np.array([np.nan, np.nan, 60.0, 40.0, 1e9, np.nan, np.nan])
    undecided = combined.undecided(gate)
    assert undecided.tolist() == [False, False, True, True, True, False, False]
    score = combined.score({"a": gate, "b": second})
    assert np.argsort(score).tolist() == [0, 1, 3, 2, 4, 5, 6]
    assert ((score[undecided] > -0.5) & (score[undecided] < 1.0)).all()
    assert score[2] == pytest.approx(-0.5 + 1.5 * (0.5 + np.arctan(z_scores(np.arange(99), [60.0])[0]) / np.pi))
    with pytest.raises(DataError, match="b: 1 of 3 scores are not a number"):
        combined.score({"a": gate, "b": np.where(gate == 60, np.nan, second)})


@pytest.mark.parametrize("band", [(-np.inf, np.inf), (-np.inf, 0.3), (0.3, np.inf), (0.3, 0.3)])
def test_an_infinite_end_leaves_no_image_beyond_it(band):
    combined = Cascade(KINDS[4], {"a": np.arange(99.0), "b": np.arange(99.0)}, band=band)
    rng = np.random.default_rng(2)
    members = {name: rng.uniform(-20, 300, size=200) for name in "ab"}
    score, undecided = combined.score(members), combined.undecided(members["a"])
    z = z_scores(combined.calibration["a"], members["a"])
    assert (undecided == ((z > band[0]) & (z < band[1]))).all()
    assert np.isfinite(score).all()
    for under, over in ((z <= band[0], z > band[0]), (z < band[1], z >= band[1])):
        if under.any() and over.any():
            assert score[under].max() <= score[over].min()


def brute_force(gate, second, band):
    """AUROC and share of one band, pair by pair."""
    inside = [(each > band[0]) & (each < band[1]) for each in gate]
    zone = [np.where(each <= band[0], 0, np.where(each >= band[1], 2, 1)) for each in gate]
    decides = [[zone[side], np.where(inside[side], second[side], gate[side])] for side in (0, 1)]
    (zone_ind, by_ind), (zone_ood, by_ood) = ([each[:, None] for each in decides[0]], decides[1])
    same = zone_ind == zone_ood
    right = (zone_ind < zone_ood) + same * ((by_ind < by_ood) + (by_ind == by_ood) / 2)
    return right.mean(), sum(each.mean() for each in inside) / 2


several = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(ind=several, groups=st.lists(several, min_size=1, max_size=3))
def test_bands_are_what_they_are_image_by_image(ind, groups):
    gate_ind, second_ind = np.array(ind, float).T
    gate_ood, second_ood = zip(*(np.array(each, float).T for each in groups), strict=True)
    bands = Bands.of(gate_ind, gate_ood, second_ind, second_ood)
    values = len(np.unique(np.concatenate([gate_ind, *gate_ood])))
    assert len(bands.ends) == 1 + values * (values + 1) // 2
    alone = [brute_force((gate_ind, gate), (second_ind, gate), (0, 0))[0] for gate in gate_ood]
    assert bands.auroc[:, 0] == pytest.approx(alone)
    assert bands.share[0] == 0
    for at, band in enumerate(bands.ends):
        if band[0] < band[1]:
            each = [
                brute_force((gate_ind, gate), (second_ind, second), band)
                for gate, second in zip(gate_ood, second_ood, strict=True)
            ]
            assert bands.auroc[:, at] == pytest.approx([auroc for auroc, _ in each])
            # As often as the others each group is half of a stream, so that their mean is the whole.
            assert bands.share[at] == pytest.approx(np.mean([share for _, share in each]))


def test_many_gate_scores_are_put_into_bins_and_the_bands_stay_true():
    rng = np.random.default_rng(5)
    gate, second = (rng.normal(size=700), rng.normal(1, 1, 500)), (rng.normal(size=700), rng.normal(2, 1, 500))
    other = rng.normal(3, 1, 300), rng.normal(0.5, 1, 300)
    bands = Bands.of(gate[0], [gate[1], other[0]], second[0], [second[1], other[1]])
    assert len(bands.ends) == 1 + MOST_BINS * (MOST_BINS + 1) // 2
    for at in rng.integers(len(bands.ends), size=5):
        near = brute_force(gate, second, bands.ends[at])
        far = brute_force((gate[0], other[0]), (second[0], other[1]), bands.ends[at])
        assert bands.auroc[:, at] == pytest.approx([near[0], far[0]])
        assert bands.share[at] == pytest.approx((near[1] + far[1]) / 2)


def aurocs(ind, groups):
    return np.array([detection_metrics(ind, each)["auroc"] for each in groups])


@pytest.mark.parametrize("loss", [0.0, 0.002, 0.02])
def test_a_cascade_loses_at_most_what_it_may_of_each_group_and_no_smaller_band_would_do(loss):
    rng = np.random.default_rng(6)
    # The second detector is the better one on near, the gate on far.
    calibration, ind, near, far = draw(rng, 150), draw(rng, 70), draw(rng, 60, 1.5), draw(rng, 25, 1.5)
    far["a"] += 4
    combined = fit_combination(
        Combination(kind="cascade", of=("a", "b"), loss=loss), calibration, (ind, {"near": near, "far": far})
    )
    least = aurocs(ind["b"], [near["b"], far["b"]]) - loss

    def is_fine(cascade, slack):
        return (aurocs(cascade.score(ind), [cascade.score(each) for each in (near, far)]) >= least - slack).all()

    def share(cascade):
        ind_, *ood = (cascade.undecided(part["a"]).mean() for part in (ind, near, far))
        return (ind_ + np.mean(ood)) / 2

    def mean(cascade):
        return aurocs(cascade.score(ind), [cascade.score(each) for each in (near, far)]).mean()

    assert is_fine(combined, 1e-9) or combined.band == (-np.inf, np.inf)
    cuts = np.unique(np.concatenate([z_scores(calibration["a"], part["a"]) for part in (ind, near, far)]))
    cuts = np.r_[-np.inf, cuts, np.inf]
    for low, high in rng.choice(cuts, size=(400, 2)):
        other = Cascade(combined.settings, combined.calibration, band=(min(low, high), max(low, high)))
        if share(other) < share(combined) - 1e-9:
            assert not is_fine(other, -1e-9)
        elif share(other) < share(combined) + 1e-9 and is_fine(other, 0):
            assert mean(other) <= mean(combined) + 1e-9


def test_a_gain_on_one_group_hides_no_loss_on_another():
    """The gate knows far-OOD alone, the second near-OOD: only together they seem to lose nothing."""
    calibration = {"a": np.arange(0.5, 200), "b": np.arange(0.5, 200)}
    ind = {"a": np.arange(100.0), "b": np.arange(100.0)}
    near, far = (
        {"a": 60.0 + np.arange(100), "b": np.full(100, 190.0)},
        {"a": np.full(400, 195.0), "b": np.full(400, 30.0)},
    )
    settings = Combination(kind="cascade", of=("a", "b"), loss=0.0)
    together = fit_combination(
        settings, calibration, (ind, {"all": {name: np.r_[near[name], far[name]] for name in "ab"}})
    )
    assert not any(together.undecided(part["a"]).any() for part in (ind, near, far))
    apart = fit_combination(settings, calibration, (ind, {"near": near, "far": far}))
    # What near-OOD and InD images share of the gate's scores, and nothing else.
    assert apart.undecided(np.array([59.0, 60.0, 80.0, 99.0, 100.0, 195.0])).tolist() == [0, 1, 1, 1, 0, 0]


def test_of_equal_shares_the_one_with_the_highest_mean_counts_however_they_are_summed():
    """0.1 + 0.7 and 0.4 + 0.4 differ in the last digit."""
    bands = Bands(
        ends=np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
        auroc=np.array([[0.9, 0.9, 0.8], [0.9, 1.0, 1.0]]),
        share_ind=np.array([0.1, 0.4, 0.0]),
        share_ood=np.array([[0.7, 0.4, 0.0], [0.7, 0.4, 0.0]]),
    )
    assert bands.share[0] < bands.share[1]
    assert bands.least([0.9, 0.9]) == (2.0, 3.0)
    assert bands.least([0.8, 0.9]) == (4.0, 5.0)
    assert bands.least([0.95, 0.9]) == (-np.inf, np.inf)


def test_the_gate_alone_is_enough_where_it_is_as_good():
    scores = np.arange(40.0)
    settings = Combination(kind="cascade", of=("a", "b"), loss=0.0)
    members = {"a": scores, "b": scores}
    same = fit_combination(settings, members, (members, {"near": members}))
    assert not same.undecided(np.linspace(-5, 60, 500)).any()


@pytest.mark.parametrize("settings", KINDS, ids=lambda each: each.kind)
def test_a_combination_comes_back_from_json_with_its_calibration_scores(settings):
    combined = fitted(settings)
    again = Combined.from_json(json.loads(json.dumps(combined.to_json(), allow_nan=False)), combined.calibration)
    rng = np.random.default_rng(7)
    members = draw(rng, 30)
    assert (again.score(members) == combined.score(members)).all()
    assert (again.score_calibration() == combined.score_calibration()).all()
    assert again.settings == settings


def test_an_infinite_band_is_json_too():
    combined = Cascade(KINDS[4], {"a": np.arange(9.0), "b": np.arange(9.0)}, band=(-np.inf, 0.5))
    written = json.dumps(combined.to_json(), allow_nan=False)
    assert Combined.from_json(json.loads(written), combined.calibration).band == (-np.inf, 0.5)


@pytest.mark.parametrize("settings", KINDS, ids=lambda each: each.kind)
def test_what_is_missing_or_no_number_is_an_error(settings):
    combined = fitted(settings)
    with pytest.raises(DataError, match="scores of b are missing"):
        combined.score({"a": np.zeros(2)})
    with pytest.raises(DataError, match="a: 1 of 2 scores are not a number"):
        combined.score({"a": np.array([np.nan, 0.0]), "b": np.zeros(2)})
    with pytest.raises(DataError, match="calibration scores of b are missing"):
        fit_combination(settings, {"a": np.zeros(2)})


NONE, SOME = {"a": np.zeros(0), "b": np.zeros(0)}, {"a": np.zeros(3), "b": np.zeros(3)}


@pytest.mark.parametrize("validation", [None, (SOME, {}), (SOME, {"near": SOME, "far": NONE}), (NONE, {"near": SOME})])
def test_a_cascade_needs_both_kinds_of_validation_images(validation):
    with pytest.raises(SettingError, match="the cascade of a and b needs InD and OOD images"):
        fit_combination(KINDS[4], draw(np.random.default_rng(0), 20), validation)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mean", "of": ["a", "b"]}, "kind"),
        ({"kind": "z-sum", "of": ["a"]}, "of: "),
        ({"kind": "z-sum", "of": ["a", "a"]}, "of: a is there twice"),
        ({"kind": "residual", "of": ["a", "b", "c"]}, "of: a residual is of 2 rows, not 3"),
        ({"kind": "cascade", "of": ["a", "b"]}, "loss is needed by a cascade"),
        ({"kind": "fisher", "of": ["a", "b"], "loss": 0.1}, "loss is needed by a cascade, and only there"),
    ],
)
def test_a_wrong_combination_is_named(values, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(Combination, values, "params.yaml")
