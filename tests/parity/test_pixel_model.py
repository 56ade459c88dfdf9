"""The pixel model with classifier guidance, against the published numbers (METHOD, section 1)."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from published import AMPLIFYING, close, configs, images_of, variant_of

from diffguard.diffusion.cutouts import draw_crops, views_of
from diffguard.diffusion.reference import reconstruct
from diffguard.diffusion.resizing import Sizing
from diffguard.diffusion.sampler import Sampler
from diffguard.diffusion.schedules import Steps, guided_diffusion_schedule

RUNS = configs("gdm_meta.json")


class Captured:
    """One captured run, made anew: its variant, its sampler and where its samples stopped."""

    def __init__(self, name, gdm, gdm_meta, expected, classifier):
        defaults, config = gdm_meta["overrides_all"], gdm_meta["configs"][name]
        size = config.get("input_size", defaults["input_size"])
        self.variant = variant_of(config, defaults, gdm_meta["seed_cutouts"])
        self.classifier, self.label = classifier, expected["in/label"]
        self.images = (images_of(expected, size) + 1) / 2
        self.sampler = Sampler.of(self.variant, gdm, size)
        [self.end] = self.sampler.invert(
            self.sampler.encode(self.images), [self.variant.stop], classifier, self.label, None
        )
        variant = self.variant
        self.start = self.sampler.schedule.start(self.end.level, variant.forback_skip_diff, variant.skip_first_steps)

    def reconstruct(self, guided, gradient=None, rows=slice(None), latents=None):
        label = self.label[rows]
        if guided and gradient is None:
            gradient = self.gradient()
        latents = self.end.latents[rows] if latents is None else latents[rows]
        made = reconstruct(
            self.sampler.denoiser,
            latents,
            self.start[rows],
            self.sampler.schedule,
            label,
            gradient=gradient if guided else None,
            clip=self.variant.clip,
        )
        return self.sampler.sizing.to_input(self.sampler.denoiser.decode(made)) * 2 - 1

    def gradient(self):
        return self.sampler.clean_gradient(self.variant.guidance, self.classifier)


@pytest.fixture(scope="module", params=RUNS)
def run(request, gdm, gdm_meta, gdm_expected, classifier):
    made = Captured(request.param, gdm, gdm_meta, gdm_expected, classifier)
    made.name = request.param
    return made


def test_schedules(gdm, gdm_expected):
    found = {m[1] for key in gdm_expected if (m := re.match(r"schedule/ddim(\d+)/", key))}
    assert found
    for levels in found:
        schedule = guided_diffusion_schedule(gdm.alphas_cumprod, int(levels))
        alpha_bar, prev = schedule.denoising.alpha_bar_from, schedule.denoising.alpha_bar_to
        made = {
            "timestep_map": schedule.inversion.timestep,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_next": schedule.inversion.alpha_bar_to,
            "alphas_cumprod_prev": prev,
            "betas": 1 - alpha_bar / prev,
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        }
        for key, expected in gdm_expected.items():
            if key.startswith(f"schedule/ddim{levels}/"):
                close(made[key.rsplit("/", 1)[1]].double(), expected.double(), 1e-12)


def test_network(gdm, gdm_expected):
    outputs = [key for key in gdm_expected if key.startswith("unet/out_t")]
    assert outputs
    x = gdm_expected["unet/in"]
    for key in outputs:
        timestep = torch.full((len(x),), int(key.removeprefix("unet/out_t")))
        with torch.no_grad():
            close(gdm.unet(x, timestep).sample, gdm_expected[key], 1e-5)


def test_classifier(classifier, gdm_expected):
    images = (gdm_expected["in/x0"] + 1) / 2
    close(classifier(images), gdm_expected["classifier/logits_of_x0"], 1e-5)
    close(classifier.features(images), gdm_expected["classifier/feature_of_x0"], 1e-5)


def test_sizes(gdm, gdm_expected):
    images = (gdm_expected["in/x0"] + 1) / 2
    for key, expected in gdm_expected.items():
        if m := re.fullmatch(r"prep/(resize|pad)_(\d+)(_noaa)?", key):
            sizing = Sizing(m[1], images.shape[-1], int(m[2]))
            made = sizing.to_model(images)
            close(made * 2 - 1, expected, 1e-6)
            if f"post/{m[1]}_{images.shape[-1]}_noaa_of_prep" in gdm_expected:
                close(sizing.to_input(made) * 2 - 1, gdm_expected[f"post/{m[1]}_{images.shape[-1]}_noaa_of_prep"], 1e-6)


def test_inversion_step_by_step(gdm, gdm_meta, gdm_expected, classifier):
    for key, expected in gdm_expected.items():
        if m := re.fullmatch(r"inversion/trajectory_sample0/clip_(True|False)", key):
            config = {"early_stop_metric": None, "clip_denoised": m[1] == "True"}
            variant = variant_of(config, gdm_meta["overrides_all"], 0)
            sampler = Sampler.of(variant, gdm, gdm_expected["in/x0"].shape[-1])
            latents = sampler.encode((gdm_expected["in/x0"][:1] + 1) / 2)
            moves = gdm_expected.get(key.replace("trajectory", "steps_of_trajectory"), torch.arange(len(expected)))
            # A move is known by its index, from 0; where the first is not stored, it may have been counted from 1.
            levels = moves.flatten().long() + (1 if 0 in moves or len(moves) == 1 else _counted_from(moves, variant))
            ends = sampler.invert(latents, levels.tolist(), classifier, torch.zeros(1).long())
            for end, x in zip(ends, expected, strict=True):
                # Unclamped, the latents grow.
                close(end.latents[0], x, 2e-5 * max(1.0, float(x.abs().max())))


def _counted_from(moves, variant):
    """What makes a level of a move's number: 0 if the last one is that of the last level, else 1."""
    return 0 if int(moves.max()) == variant.max_level else 1


def test_similarities_of_each_step(gdm, gdm_meta, gdm_expected, classifier):
    """Both captured similarities: psnr, then the stand-in of dists."""
    for key, expected in gdm_expected.items():
        if m := re.fullmatch(r"inversion/metric_log_(resize|pad)", key):
            config = {"early_stop_metric": None, "process_method": m[1]}
            variant = variant_of(config, gdm_meta["overrides_all"], 0)
            sampler = Sampler.of(variant, gdm, gdm_expected["in/x0"].shape[-1])
            latents = sampler.encode((gdm_expected["in/x0"] + 1) / 2)
            ends = sampler.invert(latents, range(1, len(expected) + 1), classifier, gdm_expected["in/label"])
            for name, column in (("psnr", 0), ("published:mean_abs", 1)):
                similar = sampler.similarity(name, classifier)
                found = torch.stack([similar(end.latents, latents) for end in ends])
                assert torch.allclose(found, expected[:, column], rtol=1e-5, atol=1e-5), name


def test_stops_and_latents(run, gdm_meta, gdm_expected):
    where = gdm_meta.get("xT_same_as", {}).get(run.name, run.name)
    # The published index counts from 0: it is one less than the number of moves.
    assert (run.end.level - 1).tolist() == gdm_expected[f"run/{run.name}/rev_t"].tolist()
    close(run.end.latents, gdm_expected[f"run/{where}/xT"], 2e-5)
    skips = gdm_meta.get("counts", {}).get(run.name, {}).get("skip_first_steps")
    if skips:
        starts = (run.variant.levels - 1 - run.start).tolist()
        assert set(starts) == set(skips)


def test_reconstructions(run, gdm_meta, gdm_expected):
    """From the stored latents: conditional and unconditional, 2e-4.

    Many guided steps amplify rounding: where moving our own latents by 1e-6, one step's rounding in
    float32, moves our own result further than 2e-4, the published figures (float32 too) are no more
    exact than that, and the tolerance is that movement. The whole chain in float64 from the same
    latents is as far from them; each single step is checked in `test_guided_steps`. Where the movement
    would be all that is seen, which only very late stops may do, the guided image is not compared.
    """
    prefix = f"run/{run.name}/"
    latents = gdm_expected[f"run/{gdm_meta.get('xT_same_as', {}).get(run.name, run.name)}/xT"]
    conditional = run.reconstruct(guided=True, latents=latents)
    unconditional = run.reconstruct(guided=False, latents=latents)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    moved = run.reconstruct(guided=True, latents=latents + 1e-6 * noise)
    guided = (moved - conditional).abs().amax(dim=(1, 2, 3)).clamp(min=2e-4)
    shows = guided < 2e-3
    late = gdm_expected[prefix + "rev_t"] >= AMPLIFYING
    assert (shows | late).all(), "so ill-conditioned a run shows nothing"
    found = 0

    def close_guided(images, stored):
        for row in torch.nonzero(shows).flatten().tolist():
            close(images[row], stored[row], float(guided[shows].max()))

    for key, expected in gdm_expected.items():
        if key == prefix + "recon_uncond_aux":
            close_guided(conditional, expected[:, 0])
            close(unconditional, expected[:, 1], 2e-4)
        elif key in (prefix + "recon_cond", prefix + "recon_no_uncond"):
            close_guided(conditional, expected)
        found += key.startswith(prefix + "recon")
    assert found
    if run.name in gdm_meta.get("uncond_recon_same_as", {}):
        other = f"run/{gdm_meta['uncond_recon_same_as'][run.name]}/recon_uncond_aux"
        close(unconditional, gdm_expected[other][:, 1], 2e-4)


def test_unconditional_reconstruction_end_to_end(run, gdm_expected):
    """From the image, through our own inversion."""
    key = f"run/{run.name}/recon_uncond_aux"
    if key in gdm_expected:
        close(run.reconstruct(guided=False), gdm_expected[key][:, 1], 2e-4)


def test_guided_steps(run, gdm_meta, gdm_expected):
    """Sample 0 step by step: crops, what the classifier sees, gradients, estimates and states."""
    trace = {key.rsplit("/", 1)[1]: gdm_expected[key] for key in gdm_expected if key.startswith(f"trace/{run.name}/")}
    if not trace:
        return
    inner, guidance, sizing = run.gradient(), run.variant.guidance, run.sampler.sizing
    if "crops_size_ox_oy" in trace:
        steps = trace["crops_size_ox_oy"].tolist()
        drawn = draw_crops(len(steps), guidance.cutouts, sizing.model_size, guidance.cutout_size, guidance.seed)
        assert drawn == [[tuple(crop) for crop in step] for step in steps]
        assert torch.equal(inner.views[: len(steps)], views_of(drawn, guidance.cutout_size, sizing.input_size))
    made = []

    class Watching:
        def at(self, step, label):
            def guide(x, x0, alpha_bar):
                gradient = inner(x, x0, alpha_bar, step, label)
                seen = torch.cat(list(inner.views_at(inner.decode(inner.gradient_input(x, x0, alpha_bar)), step)))
                clamped = x0.clamp(-1, 1) if run.variant.clip else x0
                # x0 of eps - sqrt(1 - alpha_bar) * scale * gradient, from the clamped estimate.
                guided = clamped + float(((1 / alpha_bar - 1) * (1 - alpha_bar)).sqrt()) * inner.scale * gradient
                made.append((x, seen, gradient, guided))
                return inner.scale * gradient

            return guide

    where = gdm_meta.get("xT_same_as", {}).get(run.name, run.name)
    run.reconstruct(guided=True, gradient=Watching(), rows=slice(0, 1), latents=gdm_expected[f"run/{where}/xT"])
    assert len(made) == int(run.start[0]) + 1
    first = trace["classifier_in_first"]
    # The unclamped estimate reaches far outside the image.
    close(made[0][1], first, 2e-5 * max(1.0, float(first.abs().max())))
    for (_, _, gradient, _), expected in zip(made, trace["grad"], strict=False):
        # The captured gradient has the scale in it.
        close(inner.scale * gradient[0], expected, 1e-3 * float(expected.abs().max()))
    for (_, _, _, guided), expected in zip(made, trace["pred_xstart_guided_first3"], strict=False):
        close(guided[0], expected, 2e-4)
    # The state before a step is what the one before made; captured samples are (conditional, unconditional).
    if int(run.end.level[0]) - 1 < AMPLIFYING:
        for (state, *_), expected in zip(made[1:], trace["samples"], strict=False):
            close(state[0], expected[0], 2e-4)
        return
    # A long chain amplifies rounding: one move from each stored state.
    for step, (before, expected) in enumerate(pairwise(trace["samples"]), 1):
        close(one_step(run, inner, before[0], step), expected[0], 2e-4)


def one_step(run, inner, x, step):
    """The guided move number `step` of sample 0 from a state."""

    class Later:
        def at(self, number, label):
            return inner.at(number + step, label)

    schedule, index = run.sampler.schedule, int(run.start[0]) - step
    down = Steps(
        *(
            getattr(schedule.denoising, field)[index : index + 1]
            for field in ("timestep", "alpha_bar_from", "alpha_bar_to")
        )
    )
    first = torch.zeros(1, dtype=torch.long)
    made = reconstruct(
        run.sampler.denoiser,
        x[None],
        first,
        replace(schedule, denoising=down),
        run.label[:1],
        gradient=Later(),
        clip=run.variant.clip,
    )
    return made[0]
