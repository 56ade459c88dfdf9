"""Scores of single evaluations: what they share, what they give up, and what they say when they cannot be."""

import pytest
from engine_variants import VARIANTS
from pydantic import ValidationError
from watched_denoiser import Watched

from diffguard.detectors.fitting import fit_variant
from diffguard.engine import Engine, Request, Sample
from diffguard.errors import SettingError
from diffguard.settings import ActivationGaussian, AllLabels, DenoisingErrors, LabelGuidance, NoGuidance, Variant

GAIN = VARIANTS["label-gain"]
POSTERIOR = VARIANTS["posterior"]


def posterior(**errors):
    return POSTERIOR.model_copy(update={"errors": DenoisingErrors(**errors)})


def run(images, denoiser, classifier, *variants, slots=7):
    engine = Engine(denoiser, [Request(classifier, variant) for variant in variants], slots=slots)
    results = dict(engine.run(Sample(row, image) for row, image in enumerate(images)))
    assert len(engine._pool) == 0
    return results, engine.stats.evaluations


def test_the_gain_shares_the_posteriors_evaluations(images, denoiser, classifier):
    _, alone = run(images, denoiser, classifier, POSTERIOR)
    assert alone == len(images) * 4 * denoiser.num_labels
    _, both = run(images, denoiser, classifier, GAIN, POSTERIOR)
    assert both == alone + len(images) * 4  # those under no label


def test_activations_cost_nothing_where_something_is_inverted(images, denoiser, classifier):
    _, without = run(images, denoiser, classifier, VARIANTS["unconditional"])
    _, with_activations = run(images, denoiser, classifier, VARIANTS["unconditional"], VARIANTS["activations"])
    assert with_activations == without


def test_noise_is_of_the_image_and_the_seed(images, denoiser, classifier):
    """The same image has the same score in any company; another seed is another score."""
    first, _ = run(images, denoiser, classifier, GAIN)
    again, _ = run(images.flip(0)[:5], denoiser, classifier, GAIN, slots=2)
    for row in range(5):
        assert again[row][0].score == pytest.approx(first[len(images) - 1 - row][0].score, abs=1e-5)
    other = GAIN.model_copy(update={"errors": DenoisingErrors(seed=1)})
    assert run(images, denoiser, classifier, other)[0][0][0].score != pytest.approx(first[0][0].score, abs=1e-4)


def test_the_denoisers_label_is_the_one_under_which_the_error_is_least(images, denoiser, classifier):
    results, _ = run(images, denoiser, classifier, POSTERIOR)
    assert {result[0].denoiser_label for result in results.values()} <= set(range(denoiser.num_labels))
    for result in results.values():
        # Odds against the classifier's label are below even exactly where the denoiser agrees, or nearly so.
        if result[0].score < 0:
            assert result[0].denoiser_label == result[0].label


def test_hopeless_labels_are_given_up(images, denoiser, classifier):
    whole, all_of_them = run(images, denoiser, classifier, posterior(draws=4))
    pruned, fewer = run(images, denoiser, classifier, posterior(draws=4, prune=1.0))
    assert fewer < 0.9 * all_of_them
    never, same = run(images, denoiser, classifier, posterior(draws=4, prune=1e9))
    assert same == all_of_them
    for row in range(len(images)):
        assert never[row][0].score == pytest.approx(whole[row][0].score, rel=1e-4, abs=1e-4)
        assert pruned[row][0].score <= whole[row][0].score + 1e-4  # those given up add nothing


@pytest.mark.parametrize("slots", [1, 7, 5000])  # in one call all of the others' are there before it goes on
def test_pruning_shares_what_others_have_measured(slots, images, denoiser, classifier):
    watched = Watched(denoiser)
    pruned = posterior(draws=2, prune=1.0)
    _, evaluations = run(images, watched, classifier, posterior(draws=2), GAIN, pruned, slots=slots)
    assert len(set(watched.asked)) == len(watched.asked) == evaluations
    _, without = run(images, denoiser, classifier, posterior(draws=2), GAIN)
    assert evaluations == without


def test_activations_are_fitted_on_images(images, denoiser, classifier):
    variant = Variant(stop=1, guidance=NoGuidance(), distance="denoiser-activations")
    assert variant.needs_train
    with pytest.raises(SettingError, match="distance denoiser-activations: not fitted yet"):
        Engine(denoiser, [Request(classifier, variant)], slots=4)
    fitted = fit_variant(variant, denoiser, classifier, [], [images[:7], images[7:]], slots=3)
    assert not fitted.needs_fit
    assert len(fitted.activations.mean) == 16
    train, _ = run(images, denoiser, classifier, fitted)
    # Of the images that it was fitted on, the mean squared deviation of each channel is its variance.
    mean = sum(result[0].score for result in train.values()) / len(train)
    assert mean == pytest.approx(0.5 * (len(images) - 1) / len(images), rel=0.02)
    with pytest.raises(SettingError, match="at least 8 images; there are 3"):
        fit_variant(variant, denoiser, classifier, [], [images[:3]])


def test_a_block_that_is_not_there_is_named_with_those_that_are(denoiser, classifier):
    variant = VARIANTS["activations"].model_copy(
        update={"activations": ActivationGaussian(block="middle", mean=(0.0,), variance=(1.0,))}
    )
    with pytest.raises(SettingError, match=r"activations\.block: .* no module 'middle'; it has conv_in, .*mid_block"):
        Engine(denoiser, [Request(classifier, variant)], slots=4)


class Unlabelled:
    """A denoiser that takes no labels."""

    num_labels, null_label = 0, None

    def __init__(self, denoiser):
        self._denoiser = denoiser

    def __getattr__(self, name):
        return getattr(self._denoiser, name)


@pytest.mark.parametrize("variant", [GAIN, POSTERIOR])
def test_a_denoiser_without_labels_is_refused(variant, denoiser, classifier):
    with pytest.raises(SettingError, match="needs a class-conditional denoiser"):
        Engine(Unlabelled(denoiser), [Request(classifier, variant)], slots=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": NoGuidance()}, "set guidance to {kind: label}"),
        ({"guidance": LabelGuidance(scale=2)}, "set guidance to {kind: label}"),
        ({"guidance": AllLabels(), "distance": "denoiser-activations"}, "set guidance to {kind: none}"),
        ({"against": "unconditional"}, "leave against and inversion_scale out"),
        ({"stop": {"max_level": 3, "thresholds": {"psnr": 60.0}}}, "give the noisiest level"),
        ({"errors": {"weights": [1.0]}}, "1 for the 4 noise levels"),
        ({"errors": {"weights": [0.0, 0.0, 0.0, 0.0]}}, "at least one is above 0"),
        ({"errors": {"prune": 2.0}}, "belongs to distance denoiser-posterior alone"),
        ({"distance": "l1", "errors": {}}, "errors: it belongs to distance label-gain"),
        ({"activations": {}}, "activations: it belongs to distance denoiser-activations alone"),
        ({"distance": "denoiser-activations", "guidance": NoGuidance()}, "set stop to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Variant.model_validate({"stop": 4, "guidance": LabelGuidance(), "distance": "label-gain", **settings})


def test_variants_that_were_there_are_written_as_before():
    assert {"path", "errors", "activations"}.isdisjoint(VARIANTS["cfg-w1"].model_dump())
    for name in ("label-gain-drawn", "activations"):
        assert Variant.model_validate(VARIANTS[name].model_dump(mode="json")) == VARIANTS[name]
