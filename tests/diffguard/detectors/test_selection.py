"""The best fusion: which rows validation chooses, what is recorded of it, and what is scored of it afterwards."""

import json

import numpy as np
import pytest

from diffguard.detectors.combination import Combined, fit_combination
from diffguard.errors import DataError, SettingError
from diffguard.metrics import detection_metrics, resample_scores
from diffguard.settings import Combination

ROWS = ("twin", "good", "other", "noise")


def draw(rng, count, shift=0.0):
    """A good detector, one that says the same, one that knows something else, and one that knows nothing."""
    good, other, noise = rng.normal(size=(3, count))
    return {
        "good": good + shift,
        "twin": good + shift + 0.05 * rng.normal(size=count),
        "other": other + shift,
        "noise": noise,
    }


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return draw(rng, 300), (draw(rng, 250), {"near": draw(rng, 200, 1.0), "far": draw(rng, 150, 1.5)})


def best(images, of=ROWS, cost=None, **settings):
    return fit_combination(Combination(kind="best", of=of, **settings), *images, cost)


def z_sum(images, of):
    return fit_combination(Combination(kind="z-sum", of=of), images[0])


def only(scores, names):
    return {name: scores[name] for name in names}


def test_it_takes_what_adds_something_and_leaves_what_does_not(images):
    combined = best(images)
    assert "other" in combined.members
    assert len({"good", "twin"} & set(combined.members)) == 1
    assert "noise" not in combined.members
    assert combined.always_needed == combined.members


def test_it_is_the_z_sum_of_the_chosen_and_needs_no_others_score(images):
    combined = best(images)
    same, new = z_sum(images, combined.members), only(draw(np.random.default_rng(1), 50, 0.5), combined.members)
    assert (combined.score(new) == same.score(new)).all()
    assert (combined.score_calibration() == same.score_calibration()).all()
    written = json.loads(json.dumps(combined.to_json(), allow_nan=False))
    again = Combined.from_json(written, only(images[0], combined.members))
    assert again.members == combined.members
    assert (again.score(new) == combined.score(new)).all()
    missing = combined.members[1]
    with pytest.raises(DataError, match=f"best: scores of {missing} are missing"):
        combined.score({name: scores for name, scores in new.items() if name != missing})
    with pytest.raises(DataError, match=f"{missing}: 1 of 50 scores are not a number"):
        combined.score({**new, missing: np.r_[np.nan, new[missing][1:]]})


def test_of_equal_ones_the_cheapest_is_taken(images):
    dear_good = best(images, cost=lambda names: 8.0 * ("good" in names) + 4.0 * ("twin" in names))
    assert dear_good.members == ("twin", "other")
    dear_twin = best(images, cost=lambda names: 4.0 * ("good" in names) + 8.0 * ("twin" in names))
    assert dear_twin.members == ("good", "other")
    # What adds beyond the interval is taken whatever it costs.
    assert "other" in best(images, cost=lambda names: 100.0 * ("other" in names)).members


def test_a_dear_row_is_left_where_a_cheap_one_does_as_well_and_nowhere_else(images):
    assert best(images, of=("good", "twin"), cost=lambda names: 8.0 * ("good" in names)).members == ("twin",)
    assert best(images, of=("noise", "good"), cost=lambda names: 8.0 * ("good" in names)).members == ("good",)


def test_with_too_few_images_to_tell_nothing_is_added():
    rng = np.random.default_rng(2)
    few = draw(rng, 100), (draw(rng, 6), {"near": draw(rng, 6, 1.0)})
    assert len(best(few).members) == 1


def test_more_confidence_asks_for_more(images):
    rng, counts = np.random.default_rng(3), {0.5: 0, 0.99: 0}
    for _ in range(6):
        few = draw(rng, 100), (draw(rng, 25), {"near": draw(rng, 25, 1.0)})
        for confidence in counts:
            counts[confidence] += len(best(few, confidence=confidence).members)
    assert counts[0.99] < counts[0.5]


def test_what_is_recorded_is_what_validation_says(images):
    combined = best(images, confidence=0.95)
    said, (ind, groups) = combined.validation, images[1]

    def scores(of):
        fused = z_sum(images, of)
        return fused.score(only(ind, of)), {group: fused.score(only(each, of)) for group, each in groups.items()}

    runner_up = tuple(said["runner_up"]["members"])
    assert runner_up != combined.members
    for of, auroc in ((combined.members, said["auroc"]), (runner_up, said["runner_up"]["auroc"])):
        fused_ind, fused_ood = scores(of)
        each = {group: detection_metrics(fused_ind, ood)["auroc"] for group, ood in fused_ood.items()}
        assert auroc == pytest.approx({**each, "mean": np.mean(list(each.values()))})
    drawn = [
        resample_scores([fused_ind], {group: [ood] for group, ood in fused_ood.items()}, {"both": ["near", "far"]})
        for fused_ind, fused_ood in (scores(combined.members), scores(runner_up))
    ]
    assert said["runner_up"]["difference"] == pytest.approx(drawn[0].difference(drawn[1])["both"]["auroc"])
    assert said["images"] == {"ind": 250, "near": 200, "far": 150}


def test_the_choice_is_no_better_on_new_images_than_it_says():
    """Among rows that know nothing the best looks better than it is; no fusion of them may seem to."""
    rng, members = np.random.default_rng(4), []
    for _ in range(10):
        blind = [{name: rng.normal(size=60) for name in "abcd"} for _ in range(3)]
        members.append(len(best((blind[0], (blind[1], {"near": blind[2]})), of=tuple("abcd")).members))
    assert np.mean(members) < 1.6


@pytest.mark.parametrize("validation", [None, ({"good": np.zeros(2), "other": np.zeros(2)}, {})])
def test_it_needs_both_kinds_of_validation_images(images, validation):
    with pytest.raises(SettingError, match="the best of good, other needs InD and OOD images in the validation split"):
        best((images[0], validation), of=("good", "other"))


def test_a_file_that_names_a_member_which_is_no_candidate_is_refused(images):
    written = best(images).to_json() | {"members": ["good", "stranger"]}
    with pytest.raises(DataError, match="best: 'stranger' is not one of twin, good, other, noise"):
        Combined.from_json(written, {**images[0], "stranger": np.zeros(3)})
