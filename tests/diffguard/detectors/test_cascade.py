"""Cascades: how they rank, and that a band chosen on validation loses no more than stated on new images."""

import json

import numpy as np
import pytest

from diffguard.calibration.zscores import z_scores
from diffguard.detectors.auroc_loss import AurocLoss, Placements
from diffguard.detectors.cascade import SEQUENCES, STEPS, Cascade, _Validation
from diffguard.detectors.combination import Combined, checked_sides, fit_combination
from diffguard.errors import DataError, SettingError
from diffguard.settings import Combination

SETTINGS = Combination(kind="cascade", of=("a", "b"), loss=0.01)


def draw(rng, count, gate=0.0, second=0.0):
    """Scores of a gate and of a second detector, half of whose variance is of the same."""
    common = rng.normal(size=count)
    return {
        name: shift + (common + rng.normal(size=count)) / np.sqrt(2) for name, shift in (("a", gate), ("b", second))
    }


def population(rng, count):
    """A second detector that is better on near-OOD, and a gate that is as good on far-OOD."""
    return {"ind": draw(rng, count), "near": draw(rng, count, 2.0, 3.0), "far": draw(rng, count, 5.0, 4.0)}


def some(rng, images, count):
    rows = rng.integers(len(images["a"]), size=count)
    return {name: scores[rows] for name, scores in images.items()}


def losses(cascade, images):
    """AUROC of the second detector minus that of the cascade, by group."""
    scores = {part: cascade.score(members) for part, members in images.items()}
    return {
        group: AurocLoss.of(
            Placements.of(images["ind"]["b"], images[group]["b"]), Placements.of(scores["ind"], scores[group])
        ).value
        for group in images
        if group != "ind"
    }


def share(cascade, images):
    ind, *ood = (cascade.undecided(members["a"]).mean() for members in images.values())
    return (ind + np.mean(ood)) / 2


def fit(calibration, images, loss, **settings):
    ood = {part: members for part, members in images.items() if part != "ind"}
    settings = Combination(kind="cascade", of=("a", "b"), loss=loss, **settings)
    return fit_combination(settings, calibration, (images["ind"], ood))


def test_a_cascade_ranks_cleared_under_undecided_under_rejected():
    combined = Cascade(SETTINGS, {"a": np.arange(99.0), "b": np.arange(99.0)}, band=(-0.5, 1.0))
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
    combined = Cascade(SETTINGS, {"a": np.arange(99.0), "b": np.arange(99.0)}, band=band)
    rng = np.random.default_rng(2)
    members = {name: rng.uniform(-20, 300, size=200) for name in "ab"}
    score, undecided = combined.score(members), combined.undecided(members["a"])
    z = z_scores(combined.calibration["a"], members["a"])
    assert (undecided == ((z > band[0]) & (z < band[1]))).all()
    assert np.isfinite(score).all()
    for under, over in ((z <= band[0], z > band[0]), (z < band[1], z >= band[1])):
        if under.any() and over.any():
            assert score[under].max() <= score[over].min()


@pytest.fixture(scope="module")
def known():
    """InD calibration images, and as many others of each kind as there are at all."""
    rng = np.random.default_rng(3)
    return draw(rng, 400), population(rng, 3000)


def drawn_cascades(known, loss, images, draws):
    """Cascades that are fitted on random images of each kind; what each loses on all, and its share of them."""
    (calibration, everyone), rng = known, np.random.default_rng(4)
    for _ in range(draws):
        cascade = fit(calibration, {part: some(rng, members, images) for part, members in everyone.items()}, loss)
        yield losses(cascade, everyone), share(cascade, everyone)


@pytest.mark.parametrize(("loss", "images"), [(0.02, 300), (0.05, 100), (0.05, 300)])
def test_it_loses_no_more_than_stated_whatever_images_it_was_chosen_on(known, loss, images):
    found = list(drawn_cascades(known, loss, images, draws=100))
    for group in ("near", "far"):
        assert np.mean([lost[group] > loss for lost, _ in found]) <= 0.1
    assert np.mean([shared for _, shared in found]) < 0.8


def test_with_plenty_of_images_it_saves_work(known):
    shares = [share for _, share in drawn_cascades(known, 0.01, images=3000, draws=3)]
    assert max(shares) < 0.6
    [(_, few)] = drawn_cascades(known, 0.01, images=60, draws=1)
    assert few == 1


def test_where_there_are_too_few_images_everything_goes_on_and_it_says_how_many_are_needed(known):
    (calibration, everyone), rng = known, np.random.default_rng(5)
    part = {
        name: some(rng, members, count) for (name, members), count in zip(everyone.items(), (60, 90, 50), strict=True)
    }
    cascade = fit(calibration, part, 0.01)
    assert cascade.band == (-np.inf, np.inf)
    assert cascade.undecided(np.linspace(-9, 99, 50)).all()
    said = cascade.validation
    assert (said["images"], said["share"]) == ({"ind": 60, "near": 90, "far": 50}, 1)
    times = said["images_needed"]["ind"] / 60
    assert said["images_needed"]["near"] == pytest.approx(90 * times, abs=2)
    assert 200 < said["images_needed"]["ind"] < 3000
    # The same images so many times over are enough, and four fifths of that are not.
    many = {
        name: {row: np.tile(scores, int(times) + 1) for row, scores in members.items()}
        for name, members in part.items()
    }
    assert fit(calibration, many, 0.01).validation["images_needed"] is None
    assert fit(calibration, many, 0.01).band != (-np.inf, np.inf)
    fewer = {
        name: {row: np.tile(scores, int(0.8 * times)) for row, scores in members.items()}
        for name, members in part.items()
    }
    assert fit(calibration, fewer, 0.01).band == (-np.inf, np.inf)


def test_a_gate_that_says_nothing_is_given_nothing_however_many_images_there_are(known):
    (calibration, everyone), rng = known, np.random.default_rng(6)
    blind = {part: {**members, "a": rng.normal(size=len(members["a"]))} for part, members in everyone.items()}
    cascade = fit(calibration, blind, 0.0)
    assert cascade.band == (-np.inf, np.inf)
    assert cascade.validation["images_needed"] is None


def test_what_is_recorded_is_what_the_band_does_on_validation(known):
    (calibration, everyone) = known
    cascade = fit(calibration, everyone, 0.02, confidence=0.9)
    said = cascade.validation
    assert (said["stated_loss"], said["confidence"]) == (0.02, 0.9)
    assert said["share"] == pytest.approx(share(cascade, everyone))
    for group, lost in losses(cascade, everyone).items():
        assert said["loss"][group]["value"] == pytest.approx(lost)
        assert lost < said["loss"][group]["upper"] <= 0.02
    assert share(fit(calibration, everyone, 0.02, confidence=0.999), everyone) >= said["share"]


def test_a_gain_on_one_group_hides_no_loss_on_another():
    """The gate knows far-OOD alone, the second near-OOD: only together they seem to lose nothing."""
    calibration = {"a": np.arange(0.5, 2000), "b": np.arange(0.5, 2000)}
    ind = {"a": np.arange(0, 1000.0), "b": np.arange(0, 1000.0)}
    near = {"a": np.arange(600.0, 1600), "b": np.full(1000, 1900.0)}
    far = {"a": np.full(4000, 1950.0), "b": np.full(4000, 300.0)}
    together = {"ind": ind, "all": {name: np.r_[near[name], far[name]] for name in "ab"}}
    apart = {"ind": ind, "near": near, "far": far}
    assert not fit(calibration, together, 0.01).undecided(near["a"][:300]).any()
    cascade = fit(calibration, apart, 0.01)
    assert losses(cascade, apart)["near"] <= 0.01
    assert cascade.undecided(near["a"][30:300]).all()
    assert not cascade.undecided(np.r_[ind["a"][:500], far["a"]]).any()


def test_bands_of_a_sequence_lie_in_one_another_and_leave_out_growing_shares(known):
    (calibration, everyone), rng = known, np.random.default_rng(7)
    part = {
        name: some(rng, members, count) for (name, members), count in zip(everyone.items(), (300, 70, 500), strict=True)
    }
    ood = {name: members for name, members in part.items() if name != "ind"}
    images = _Validation.of(SETTINGS, calibration, checked_sides(SETTINGS, (part["ind"], ood)))
    for under, over in SEQUENCES:
        bands = list(images.bands(under, over))
        assert len(bands) == STEPS
        low, high = np.array(bands).T
        assert (np.diff(low) >= 0).all() if under else (low == -np.inf).all()
        assert (np.diff(high) <= 0).all() if over else (high == np.inf).all()
        for step, band in enumerate(bands[:-1], start=1):
            left_out = 1 - share(Cascade(SETTINGS, calibration, band), part)
            # Calibration scores between which several images lie give these the same z-score.
            assert -1e-9 < left_out - step / STEPS < 0.1
        assert share(Cascade(SETTINGS, calibration, bands[-1]), part) < 0.02


def test_a_band_of_before_there_was_more_to_record_is_opened():
    combined = Cascade(SETTINGS, {"a": np.arange(9.0), "b": np.arange(9.0)}, band=(-np.inf, 0.5))
    written = json.loads(json.dumps(combined.to_json(), allow_nan=False))
    assert written == {"settings": SETTINGS.model_dump(mode="json"), "band": [None, 0.5], "line": None}
    assert Combined.from_json(written, combined.calibration).band == (-np.inf, 0.5)


NONE, SOME = {"a": np.zeros(0), "b": np.zeros(0)}, {"a": np.zeros(3), "b": np.zeros(3)}


@pytest.mark.parametrize("validation", [None, (SOME, {}), (SOME, {"near": SOME, "far": NONE}), (NONE, {"near": SOME})])
def test_a_cascade_needs_both_kinds_of_validation_images(validation):
    with pytest.raises(SettingError, match="the cascade of a, b needs InD and OOD images"):
        fit_combination(SETTINGS, draw(np.random.default_rng(0), 20), validation)
