"""The weighted fusion: what gets a weight, what is recorded of it, and what is scored of it afterwards."""

import json

import numpy as np
import pytest

from diffguard.detectors.combination import Combined, fit_combination
from diffguard.errors import DataError, SettingError
from diffguard.metrics import detection_metrics
from diffguard.settings import Combination

ROWS = ("strong", "weak", "noise", "opposite")


def draw(rng, count, shift=0.0):
    """A strong detector, a weak one that knows something else, one that knows nothing and one that has it reversed."""
    strong, weak, noise, opposite = rng.normal(size=(4, count))
    return {"strong": strong + 2 * shift, "weak": weak + shift, "noise": noise, "opposite": opposite - shift}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return draw(rng, 500), (draw(rng, 400), {"near": draw(rng, 300, 0.5), "far": draw(rng, 100, 1.0)})


def weighted(images, of=ROWS):
    return fit_combination(Combination(kind="weighted", of=of), *images)


def only(scores, names):
    return {name: scores[name] for name in names}


def auroc(combined, rng):
    ind, ood = (only(draw(rng, 5000, shift), combined.members) for shift in (0.0, 0.5))
    return detection_metrics(combined.score(ind), combined.score(ood))["auroc"]


def test_what_tells_more_weighs_more_and_what_misleads_is_left_out(images):
    combined = weighted(images)
    weights = combined.weights
    assert weights["strong"] > 1.5 * weights["weak"]
    assert weights["weak"] > 3 * weights.get("noise", 0)
    assert "opposite" not in weights
    assert np.mean(list(weights.values())) == pytest.approx(1)
    assert combined.always_needed == combined.members == tuple(weights)


def test_it_is_better_than_equal_weights_on_new_images(images):
    equal = fit_combination(Combination(kind="z-sum", of=ROWS[:3]), images[0])
    ours, theirs = (auroc(combined, np.random.default_rng(1)) for combined in (weighted(images, ROWS[:3]), equal))
    assert ours > theirs + 0.01


def test_every_group_of_ood_images_weighs_the_same_however_many_it_has():
    rng = np.random.default_rng(2)

    def seen(count, near=0.0, far=0.0):
        return {"of-near": rng.normal(size=count) + near, "of-far": rng.normal(size=count) + far}

    calibration, ind, near = seen(500), seen(2000), seen(2000, near=2.0)
    ratios = []
    for count in (200, 20_000):
        groups = {"near": near, "far": seen(count, far=2.0)}
        weights = weighted((calibration, (ind, groups)), ("of-near", "of-far")).weights
        ratios.append(weights["of-far"] / weights["of-near"])
    assert ratios == pytest.approx([1, 1], rel=0.2)


def test_rows_that_all_mislead_are_weighed_alike(images):
    calibration, (ind, groups) = images
    reversed_too = {"a": "opposite", "b": "opposite"}

    def of(scores):
        return {name: scores[row] for name, row in reversed_too.items()}

    combined = fit_combination(
        Combination(kind="weighted", of=("a", "b")),
        of(calibration),
        (of(ind), {name: of(scores) for name, scores in groups.items()}),
    )
    assert combined.weights == {"a": 1.0, "b": 1.0}


def test_an_infinite_score_of_validation_is_no_error(images):
    calibration, (ind, groups) = images
    near = {name: scores.copy() for name, scores in groups["near"].items()}
    near["strong"][0] = np.inf
    weights = weighted((calibration, (ind, {**groups, "near": near}))).weights
    assert weights == pytest.approx(weighted(images).weights, abs=0.05)


def test_what_was_fitted_is_recorded_and_restored(images):
    combined = weighted(images)
    written = json.loads(json.dumps(combined.to_json(), allow_nan=False))
    assert written["validation"]["images"] == {"ind": 400, "near": 300, "far": 100}
    assert set(written["validation"]["auroc"]) == {"near", "far", "mean"}
    again = Combined.from_json(written, only(images[0], combined.members))
    new = only(draw(np.random.default_rng(3), 50, 0.5), combined.members)
    assert (again.score(new) == combined.score(new)).all()
    assert (again.score_calibration() == combined.score_calibration()).all()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"weights": {"strong": 1.0, "other": 1.0}, "members": ["strong", "other"]}, "'other' is not one of strong"),
        ({"weights": {"strong": -1.0}, "members": ["strong"]}, "the weight of strong is -1.0, not more than 0"),
        ({"weights": {"strong": 1.0}, "members": ["weak"]}, "its weights are not those of weak"),
        ({"weights": {}, "members": []}, "its weights are not those of any row"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(images, changed, says):
    values = {**weighted(images).to_json(), **changed}
    calibration = {name: np.arange(9.0) for name in (*ROWS, "other")}
    with pytest.raises(DataError, match=f"weighted: {says}"):
        Combined.from_json(values, calibration)


def test_a_file_whose_keys_were_sorted_is_the_same(images):
    combined = weighted(images)
    written = json.loads(json.dumps(combined.to_json(), sort_keys=True))
    assert Combined.from_json(written, only(images[0], combined.members)).members == combined.members


def test_it_needs_validation_images_of_both_kinds(images):
    with pytest.raises(SettingError, match="the weighted of strong, weak, noise, opposite needs InD and OOD images"):
        weighted((images[0], None))
