"""A sample's score is its own: whatever batch, order or company it was scored in."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from watched_denoiser import Watched

from diffguard.detectors.fitting import fit_variant
from diffguard.diffusion.early_stop import psnr
from diffguard.diffusion.reference import invert, reconstruct
from diffguard.diffusion.schedules import trailing_schedule
from diffguard.engine import Request, score_batch
from diffguard.errors import DataError, SettingError
from diffguard.models.gradcam import cam_mask
from diffguard.settings import (
    STANDARD_PATH,
    AdaptiveStop,
    AllLabels,
    ClassifierGuidance,
    LabelGuidance,
    NoGuidance,
    Variant,
)

VARIANTS = {
    "cfg-w1": Variant(stop=4, guidance=LabelGuidance(scale=1), distance="l1"),
    "cfg-w2": Variant(stop=4, guidance=LabelGuidance(scale=2), distance="l1"),
    "early-stop": Variant(
        stop=AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": 52.5}),
        guidance=LabelGuidance(scale=2),
        distance="l1",
    ),
    "paper-cfg": Variant(stop=5, guidance=LabelGuidance(scale=10, cam_cut=0.3), distance="logits"),
    "paper-cg": Variant(stop=5, guidance=ClassifierGuidance(cutout_size=7), distance="l1", against="unconditional"),
    "unconditional": Variant(stop=4, guidance=NoGuidance(), distance="l1"),
    "min-over-labels": Variant(stop=4, guidance=AllLabels(), distance="l1"),
    "path": Variant(stop=4, guidance=NoGuidance(), distance="path", path=STANDARD_PATH),
    "gain": Variant(stop=4, guidance=AllLabels(), distance="features-normalized", against="gain"),
}


def everything(images, denoiser, classifier):
    requests = [Request(classifier, variant) for variant in VARIANTS.values()]
    return dict(zip(VARIANTS, score_batch(images, denoiser, requests), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_alone_or_in_any_company_the_score_is_the_same(name, images, denoiser, classifier):
    together = everything(images, denoiser, classifier)[name]
    for order in (torch.arange(12), torch.tensor([7, 3, 11])):
        [alone] = score_batch(images[order], denoiser, [Request(classifier, VARIANTS[name])])
        assert torch.equal(alone.level, together.level[order])
        assert torch.allclose(alone.score, together.score[order], atol=1e-4)
        if together.reconstruction is None:
            assert alone.reconstruction is None
        else:
            assert torch.allclose(alone.reconstruction, together.reconstruction[order], atol=1e-4)


@settings(max_examples=6, deadline=None)
@given(rows=st.lists(st.integers(0, 11), min_size=1, max_size=9))
def test_any_batch_of_any_order_scores_alike(rows, images, denoiser, classifier):
    whole = everything(images, denoiser, classifier)
    part = everything(images[rows], denoiser, classifier)
    for name in VARIANTS:
        assert torch.allclose(part[name].score, whole[name].score[rows], atol=1e-4), name


def test_variants_scored_together_ask_for_each_plain_evaluation_once(images, denoiser, classifier):
    watched = Watched(denoiser)
    names = ["cfg-w1", "unconditional", "min-over-labels"]
    score_batch(images, watched, [Request(classifier, VARIANTS[name]) for name in names])
    # Four steps up without a label; four down under each of six labels and without one.
    assert len(watched.asked) == 12 * (4 + 4 * 7)
    assert len(set(watched.asked)) == len(watched.asked)


@pytest.mark.parametrize("name", ["cfg-w1", "min-over-labels"])
def test_gain_is_the_difference_of_two_rows_and_costs_nothing_beside_them(name, images, denoiser, classifier):
    gain = VARIANTS[name].model_copy(update={"against": "gain"})
    rows = [VARIANTS[name], VARIANTS["unconditional"]]
    watched, beside = Watched(denoiser), Watched(denoiser)
    guided, unguided = score_batch(images, watched, [Request(classifier, variant) for variant in rows])
    [*_, difference] = score_batch(images, beside, [Request(classifier, variant) for variant in [*rows, gain]])
    assert torch.allclose(difference.score, guided.score - unguided.score, atol=1e-5)
    assert torch.allclose(difference.reconstruction, guided.reconstruction, atol=1e-5)
    assert torch.allclose(difference.unconditional, unguided.reconstruction, atol=1e-5)
    assert len(beside.asked) == len(watched.asked)
    assert (difference.score != 0).all()


def test_adaptive_stop_is_the_first_level_under_the_threshold(images, denoiser):
    schedule, latents = trailing_schedule(denoiser.alphas_cumprod, 10), denoiser.encode(images)
    path = invert(denoiser, latents, schedule, list(range(1, 8)), clip=True)
    similarity = torch.stack([psnr(end.latents, latents) for end in path])
    threshold = float(similarity[3].median())
    [stopped] = invert(
        denoiser, latents, schedule, [AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": threshold})], clip=True
    )
    expected = [next((k for k in range(2, 7) if similarity[k - 1, i] < threshold), 7) for i in range(12)]
    assert stopped.level.tolist() == expected
    assert len(set(expected)) > 1
    for sample, level in enumerate(expected):
        assert torch.allclose(stopped.latents[sample], path[level - 1].latents[sample], atol=1e-5)


def test_median_threshold_comes_from_the_calibration_images(images, denoiser, classifier):
    variant = Variant(
        stop=AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": None}, median_at=4),
        guidance=LabelGuidance(scale=2),
        distance="l1",
    )
    latents = denoiser.encode(images)
    [there] = invert(denoiser, latents, trailing_schedule(denoiser.alphas_cumprod, 10), [4], clip=True)
    fitted = fit_variant(variant, denoiser, classifier, [images[:5], images[5:]])
    assert fitted.stop.thresholds["psnr"] == pytest.approx(float(psnr(there.latents, latents).median()), abs=1e-4)
    assert not fitted.needs_fit


FITTED = {
    "stop": Variant(
        stop=AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": None, "features": None}, median_at=4),
        guidance=LabelGuidance(scale=2),
        distance="l1",
    ),
    "path": Variant(stop=4, guidance=NoGuidance(), distance="path"),
}


@pytest.mark.parametrize("name", FITTED)
def test_fitting_halves_the_batch_once_when_memory_ends(name, images, denoiser, classifier, caplog):
    batches = [images[:8], images[8:], images.flip(-1)]
    expected = fit_variant(FITTED[name], denoiser, classifier, batches, batches)
    watched = Watched(denoiser, most=5)
    with caplog.at_level(logging.WARNING, logger="diffguard"):
        fitted = fit_variant(FITTED[name], watched, classifier, batches, batches, slots=8)
    assert [record.getMessage() for record in caplog.records] == ["out of memory on cpu: from here on 4 images a batch"]
    assert max(watched.batches) == 4
    if name == "stop":
        assert fitted.stop.thresholds == pytest.approx(expected.stop.thresholds, rel=1e-4)
    else:
        assert fitted.path.mean == pytest.approx(expected.path.mean, rel=1e-4, abs=1e-6)


def test_fitting_asks_for_as_many_as_there_are_slots(images, denoiser, classifier):
    for variant in FITTED.values():
        watched = Watched(denoiser, most=5)
        fit_variant(variant, watched, classifier, [images], [images], slots=5)
        assert max(watched.batches) == 5


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**16), depth=st.integers(2, 4))
def test_unguided_reconstruction_returns_to_the_image_as_steps_grow(seed, depth, denoiser):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    errors = []
    for levels in (10, 100, 500):
        schedule, latents = trailing_schedule(denoiser.alphas_cumprod, levels), denoiser.encode(images)
        [end] = invert(denoiser, latents, schedule, [levels * depth // 10], clip=False)
        null = torch.full((4,), denoiser.null_label)
        back = reconstruct(denoiser, end.latents, schedule.start(end.level, 1, 0), schedule, null, clip=False)
        errors.append(float((back - latents).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    start=st.integers(0, 9),
    scale=st.floats(0.5, 10),
    labels=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_guidance_that_does_nothing_changes_nothing(seed, start, scale, labels, denoiser):
    """Scale 0 and a mask of zeros are unconditional; a mask of ones is no mask."""
    schedule = trailing_schedule(denoiser.alphas_cumprod, 10)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    first, label = torch.full((4,), start), torch.tensor(labels)
    null = torch.full((4,), denoiser.null_label)

    def made(label, **guidance):
        return reconstruct(denoiser, x, first, schedule, label, clip=True, **guidance)

    unconditional = made(null)
    assert torch.allclose(made(label, scale=0.0), unconditional, atol=1e-5)
    assert torch.allclose(made(label, scale=scale, mask=torch.zeros(4, 1, 8, 8)), unconditional, atol=1e-5)
    assert torch.allclose(made(label, scale=scale, mask=torch.ones(4, 1, 8, 8)), made(label, scale=scale), atol=1e-4)


def test_classifier_guidance_raises_the_labels_probability(images, denoiser, classifier):
    requests = [
        Request(classifier, Variant(stop=5, guidance=ClassifierGuidance(scale=s, cutout_size=7), distance="l1"))
        for s in (0.0, 3.0)
    ]
    without, with_it = score_batch(images, denoiser, requests)
    rows = torch.arange(12)
    confidence = [classifier(each.reconstruction).log_softmax(1)[rows, each.label] for each in (without, with_it)]
    assert (confidence[1] > confidence[0]).float().mean() > 0.8


def test_cam_mask_is_within_the_image_and_a_negative_cut_is_its_other_side(images, classifier):
    label = classifier(images).argmax(1)
    over = cam_mask(classifier, images, label, 0.3, (8, 8))
    under = cam_mask(classifier, images, label, -0.3, (8, 8))
    assert over.shape == (12, 1, 8, 8)
    assert set(over.unique().tolist()) <= {0.0, 1.0}
    assert 0 < over.mean() < 1
    assert torch.equal(over + under, torch.ones_like(over))


def test_images_of_another_size_are_refused(images, denoiser, classifier):
    with pytest.raises(DataError, match=r"image 0 is \(1, 4, 8\).*1, 8, 8"):
        score_batch(images[:, :, :4], denoiser, [Request(classifier, VARIANTS["cfg-w1"])])


def test_a_threshold_that_was_never_set_is_refused(images, denoiser):
    stop = AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": None}, median_at=4)
    with pytest.raises(SettingError, match=r"stop\.thresholds"):
        invert(denoiser, images, trailing_schedule(denoiser.alphas_cumprod, 10), [stop], clip=True)
