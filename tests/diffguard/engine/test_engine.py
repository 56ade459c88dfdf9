"""The engine against the plain path, and what it promises: each evaluation once, in full batches."""

import logging
from copy import deepcopy

import pytest
import torch
from engine_variants import VARIANTS
from pydantic import ValidationError
from watched_denoiser import Watched

from diffguard.diffusion.activations import activation_score, captured
from diffguard.diffusion.denoising_errors import (
    add_noise,
    content_of,
    denoising_error,
    label_gain,
    paired_noise,
    posterior_odds,
)
from diffguard.diffusion.path_statistics import fit_path, path_score
from diffguard.diffusion.reference import reconstruct
from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import get_distance
from diffguard.engine import Engine, Request, Sample, tune
from diffguard.errors import DataError, SettingError
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.models.gradcam import cam_mask
from diffguard.settings import (
    AllLabels,
    ClassifierGuidance,
    NoGuidance,
    Variant,
)

COUNT = 10


@pytest.fixture(scope="module")
def denoiser(denoiser):
    """One that predicts little noise, so that an image's contrast decides where it stops."""
    unet = deepcopy(denoiser.unet)
    unet.conv_out.weight *= 0.1
    unet.conv_out.bias *= 0.1
    return PixelDenoiser(unet, denoiser.scheduler)


def contrasts(count, seed):
    """Random black and white images of different contrast, in random order."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.linspace(0.1, 1, count)[torch.randperm(count, generator=generator)]
    bits = torch.randint(0, 2, (count, 1, 8, 8), generator=generator)
    return 0.5 + (bits - 0.5) * contrast[:, None, None, None]


@pytest.fixture(scope="module")
def many():
    return contrasts(COUNT, seed=3)


def plainly(image, denoiser, classifier, variant):
    """One image, one variant, with nothing but `invert` and `reconstruct`."""
    x, sampler = image[None], Sampler.of(variant, denoiser, 8)
    label = classifier(x).argmax(1)
    null = torch.full_like(label, denoiser.null_label)
    if variant.is_single_step:
        return 0, single_step(x, sampler, denoiser, label, null, variant)
    [end] = sampler.invert(sampler.encode(x), [variant.stop], classifier, label, variant.inversion_scale)
    if not variant.reconstructs:
        return int(end.level), float(path_score(variant.path, end.path))
    start = sampler.schedule.start(end.level, variant.forback_skip_diff, variant.skip_first_steps)

    def made(toward, **guidance):
        options = {"clip": variant.clip, "solver": variant.solver, **guidance}
        return sampler.decode(reconstruct(denoiser, end.latents, start, sampler.schedule, toward, **options))

    guidance = variant.guidance
    if isinstance(guidance, AllLabels):
        pictures = [made(torch.tensor([each])) for each in range(denoiser.num_labels)]
    elif isinstance(guidance, NoGuidance):
        pictures = [made(null)]
    elif isinstance(guidance, ClassifierGuidance):
        pictures = [made(label, gradient=sampler.clean_gradient(guidance, classifier))]
    else:
        cut = guidance.cam_cut
        mask = None if cut is None else cam_mask(classifier, x, label, cut, (8, 8))
        pictures = [made(label, scale=guidance.scale, mask=mask)]
    distance = get_distance(variant.distance)
    against = made(null) if variant.against == "unconditional" else x
    score = min(float(distance(against, each, classifier)) for each in pictures)
    if variant.against == "gain":
        score -= float(distance(x, made(null), classifier))
    return int(end.level), score


def single_step(x, sampler, denoiser, label, null, variant):
    """The score of a variant that takes no trajectory, by the formulas alone."""
    latents = sampler.encode(x)
    if variant.distance == "denoiser-activations":
        with captured(denoiser, variant.activations.block) as outputs:
            denoiser.eps(latents, torch.tensor([sampler.schedule.inversion.timesteps[0]]), null)
        return float(activation_score(variant.activations, outputs[0]))
    settings, steps = variant.denoising_errors, sampler.schedule.denoising
    weights = torch.tensor(settings.weights or (1.0,) * variant.stop)

    def errors(label):
        taken = []
        for draw in range(settings.draws):
            for level in range(variant.stop):
                timestep = steps.timestep[level : level + 1]
                noise = paired_noise(content_of(x[0]), settings.seed, draw, int(timestep), latents.shape)
                noisy = add_noise(latents, noise, steps.alpha_bar_from[level : level + 1])
                taken.append(denoising_error(denoiser.eps(noisy, timestep, label), noise))
        return torch.stack(taken, dim=1)

    weights = weights.repeat(settings.draws)
    if variant.distance == "label-gain":
        return float(label_gain(errors(label), errors(null), weights))
    by_label = torch.stack([errors(torch.tensor([each])) for each in range(denoiser.num_labels)], dim=1)
    return float(posterior_odds(by_label, label, weights, latents.numel()))


def run(images, denoiser, classifier, variants, order=None, **options):
    engine = Engine(denoiser, [Request(classifier, variant) for variant in variants], **options)
    rows = range(len(images)) if order is None else order
    return dict(engine.run(Sample(row, images[row]) for row in rows)), engine.stats


@pytest.fixture(scope="module")
def plain(many, denoiser, classifier):
    return [[plainly(image, denoiser, classifier, variant) for variant in VARIANTS.values()] for image in many]


@pytest.mark.parametrize(("slots", "shuffled"), [(1, False), (7, True), (64, True), (64, False)])
def test_the_engine_agrees_with_the_plain_path(slots, shuffled, many, plain, denoiser, classifier):
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(slots)).tolist() if shuffled else None
    found, _ = run(many, denoiser, classifier, VARIANTS.values(), order, slots=slots)
    assert sorted(found) == list(range(COUNT))
    levels = set()
    for row, expected in enumerate(plain):
        for index, (name, (level, score)) in enumerate(zip(VARIANTS, expected, strict=True)):
            assert found[row][index].level == level, name
            assert found[row][index].score == pytest.approx(score, abs=1e-4, rel=1e-5), name
            levels.add(level)
    assert len(levels) > 4


def test_a_path_costs_its_inversion_and_nothing_where_another_variant_makes_it(many, denoiser, classifier):
    watched = Watched(denoiser)
    found, alone = run(many, watched, classifier, [VARIANTS["path"]], slots=7)
    assert alone.evaluations == len(set(watched.asked)) == 4 * COUNT
    assert all(each[0].reconstruction is None and each[0].unconditional is None for each in found.values())
    _, without = run(many, denoiser, classifier, [VARIANTS["cfg-w1"]], slots=7)
    together, both = run(many, denoiser, classifier, [VARIANTS["cfg-w1"], VARIANTS["path"]], slots=7)
    assert both.evaluations == without.evaluations
    for row in range(COUNT):
        assert together[row][1].path == pytest.approx(found[row][0].path, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("names", [*([name] for name in VARIANTS), list(VARIANTS)], ids=lambda names: "+".join(names))
def test_no_latents_are_left_behind(names, many, denoiser, classifier):
    engine = Engine(denoiser, [Request(classifier, VARIANTS[name]) for name in names], slots=7)
    list(engine.run(Sample(row, image, unconditional=row % 2 == 0) for row, image in enumerate(many)))
    assert len(engine._pool) == 0


def test_no_latents_are_left_behind_when_memory_ends(many, denoiser, classifier):
    """Of a batch that did not fit nothing is kept, wherever in a step memory ended."""
    variants = [VARIANTS["second-order"], VARIANTS["path-early-stop"], VARIANTS["paper-cg"]]
    engine = Engine(denoiser, [Request(classifier, variant) for variant in variants], slots=16)
    put_all, is_full = engine._pool.put_all, iter([True, False, False, True])

    def put_all_with_little_memory(batches):
        if len(batches) > 1 and len(batches[0]) > 1 and next(is_full, False):
            raise torch.OutOfMemoryError("more than this device holds")
        return put_all(batches)

    engine._pool.put_all = put_all_with_little_memory
    list(engine.run(Sample(row, image) for row, image in enumerate(many)))
    assert next(is_full, None) is None
    assert len(engine._pool) == 0


def test_a_path_that_was_not_fitted_is_refused(denoiser, classifier):
    unfitted = VARIANTS["path"].model_copy(update={"path": None})
    with pytest.raises(SettingError, match=r"distance path: not fitted yet"):
        Engine(denoiser, [Request(classifier, unfitted)], slots=4)


def test_a_fitted_path_scores_alike_in_any_batch_and_order(many, denoiser, classifier):
    statistics = [run(many, denoiser, classifier, [VARIANTS["path"]], slots=4)[0][row][0].path for row in range(COUNT)]
    fitted = VARIANTS["path"].model_copy(update={"path": fit_path(torch.tensor(statistics, dtype=torch.float64))})
    alone = {row: each[0].score for row, each in run(many, denoiser, classifier, [fitted], slots=1)[0].items()}
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(5)).tolist()
    for company in ([fitted], [VARIANTS["min-over-labels"], fitted, VARIANTS["path"]]):
        found, _ = run(many, denoiser, classifier, company, order, slots=7)
        index = company.index(fitted)
        assert {row: each[index].score for row, each in found.items()} == pytest.approx(alone, rel=1e-3)


def test_each_distinct_triple_is_evaluated_once_across_all_variants(many, denoiser, classifier):
    # The second-order solver's first two moves are of first order: there its states are also another's.
    variants = [variant for name, variant in VARIANTS.items() if name != "second-order"]
    together = Watched(denoiser)
    _, stats = run(many, together, classifier, variants, slots=16)
    assert len(set(together.asked)) == len(together.asked) == stats.evaluations
    alone = 0
    for variant in variants:
        watched = Watched(denoiser)
        _, stats = run(many, watched, classifier, [variant], slots=16)
        assert len(set(watched.asked)) == len(watched.asked)
        alone += stats.evaluations
    assert len(together.asked) < 0.75 * alone


def test_classifier_guidance_costs_its_inversion_and_two_evaluations_a_step(many, denoiser, classifier):
    found, stats = run(many, denoiser, classifier, [VARIANTS["paper-cg"]], slots=16)
    levels = [each[0].level for each in found.values()]
    assert len(set(levels)) > 3
    # Levels count from 1, stop indices k from 0; a first denoising step has one state for both images,
    # and that state was asked for on the way up where the walk went on.
    k_and_n = [(level - 1, level) for level in levels]
    assert stats.evaluations <= sum((k + 1) + 2 * n for k, n in k_and_n)
    assert stats.evaluations == sum((k + 1) + 2 * n - 1 for k, n in k_and_n)
    assert stats.gradients == sum(n for _, n in k_and_n)


def test_batches_are_full_though_images_stop_at_different_steps(denoiser, classifier):
    watched = Watched(denoiser)
    found, stats = run(contrasts(1000, seed=4), watched, classifier, [VARIANTS["cfg-early-stop"]], slots=64)
    levels = [each[0].level for each in found.values()]
    assert max(levels) >= 3 * min(levels)
    assert stats.occupancy >= 0.95
    assert stats.calls == len(watched.batches)
    assert set(watched.batches[: int(0.9 * stats.calls)]) == {64}


def test_fixed_batches_have_one_shape(many, plain, denoiser, classifier):
    watched = Watched(denoiser)
    found, stats = run(many, watched, classifier, [VARIANTS["cfg-w2"]], slots=24, fixed=True)
    assert set(watched.batches) == {24}
    assert stats.evaluations < sum(watched.batches)
    assert all(found[row][0].score == pytest.approx(plain[row][1][1], abs=1e-4) for row in range(COUNT))


def test_out_of_memory_halves_the_batch_and_goes_on(many, plain, denoiser, classifier, caplog):
    watched = Watched(denoiser, most=10)
    with caplog.at_level(logging.WARNING, logger="diffguard"):
        found, _ = run(many, watched, classifier, VARIANTS.values(), slots=16)
    assert [record.getMessage() for record in caplog.records] == ["out of memory on cpu: from here on 8 images a batch"]
    assert max(watched.batches) == 8
    for row, expected in enumerate(plain):
        for index, (_, score) in enumerate(expected):
            assert found[row][index].score == pytest.approx(score, abs=1e-4, rel=1e-5)


def test_when_one_image_is_too_much_it_says_so(many, denoiser, classifier):
    with pytest.raises(torch.OutOfMemoryError):
        run(many[:4], Watched(denoiser, most=0), classifier, [VARIANTS["cfg-w1"]], slots=4)


def test_the_first_calls_are_of_the_first_images(many, denoiser, classifier):
    """What comes in is not read far ahead of what is worked on."""
    taken = []

    def source():
        for row, image in enumerate(many.repeat(10, 1, 1, 1)):
            taken.append(row)
            yield Sample(row, image)

    engine = Engine(denoiser, [Request(classifier, VARIANTS["cfg-w2"])], slots=8)
    for finished, (_, _) in enumerate(engine.run(source()), start=1):
        assert len(taken) - finished <= 4 * 8


def test_a_sample_answers_only_what_it_is_asked(many, denoiser, classifier):
    requests = [Request(classifier, VARIANTS[name]) for name in ("cfg-w1", "unconditional")]
    engine = Engine(denoiser, requests, slots=4)
    found = dict(engine.run([Sample("a", many[0], wanted=[1]), Sample("b", many[1], unconditional=True)]))
    assert list(found["a"]) == [1]
    assert found["a"][1].unconditional is None
    assert torch.equal(found["b"][0].unconditional, found["b"][1].reconstruction)


def test_images_of_two_sizes_are_refused_by_name(many, denoiser, classifier):
    variant = VARIANTS["cfg-w1"].model_copy(update={"process_method": "resize"})
    samples = [Sample("first", many[0]), Sample("second", torch.rand(1, 9, 9))]
    engine = Engine(denoiser, [Request(classifier, variant)], slots=4)
    with pytest.raises(DataError, match=r"image second is \(1, 9, 9\), the ones before are \(1, 8, 8\)"):
        list(engine.run(samples))


class Paced:
    """A denoiser that takes its time by a clock of its own: what a call costs, and each image beyond ``free``."""

    def __init__(self, denoiser, free, most=10**9):
        self._denoiser, self.free, self.most, self.now = denoiser, free, most, 0.0

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def perf_counter(self):
        return self.now

    thread_time = perf_counter

    def eps(self, x, timestep, label):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("more than this device holds")
        self.now += 0.001 + 0.001 * max(0, len(x) - self.free)
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("free", "limits", "picked"),
    [
        (8, {}, 8),  # beyond 8 images a call, each costs what it saves
        (0, {}, 32),  # from there on it gains less than 3 %
        (10**9, {}, 256),
        (10**9, {"largest": 64}, 64),
        (10**9, {"seconds": 0.009}, 4),  # 4 calls of a size: in the third one the time is up
    ],
)
def test_slots_are_the_fewest_at_which_the_network_is_fastest(free, limits, picked, denoiser, monkeypatch):
    paced = Paced(denoiser, free)
    monkeypatch.setattr("diffguard.engine.tuning.time", paced)
    assert tune(paced, "float32", **limits).slots == picked


def test_slots_are_no_more_than_memory_holds(denoiser, monkeypatch):
    paced = Paced(denoiser, free=10**9, most=4)
    monkeypatch.setattr("diffguard.engine.tuning.time", paced)
    assert tune(paced, "float32", largest=64).slots == 4


def test_inversion_goes_to_the_end_of_a_grid_of_more_levels_and_no_further(denoiser, classifier, images):
    """Latent diffusion's 12 steps are 13 where 12 does not divide 1000: timesteps 1, 84, ... 997."""
    settings = {"grid": "latent-diffusion", "levels": 12, "guidance": NoGuidance(), "distance": "l1"}
    whole = Variant(stop=13, **settings)
    engine = Engine(denoiser, [Request(classifier, whole)], slots=1)
    [(_, found)] = engine.run([Sample(0, images[0])])
    assert found[0].level == 13
    with pytest.raises(ValidationError, match=r"stop: level 14 is not within 1\.\.13"):
        Variant(stop=14, **settings)

    class FewerSteps:
        """The same denoiser, trained on 996 steps: 12 divides them."""

        alphas_cumprod = denoiser.alphas_cumprod[:996]

        def __getattr__(self, name):
            return getattr(denoiser, name)

    with pytest.raises(SettingError, match="stop: level 13 is above the 12 of this denoiser's grid"):
        Engine(FewerSteps(), [Request(classifier, whole)], slots=1)
