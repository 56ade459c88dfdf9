"""The latent model with classifier-free guidance, against the published numbers (METHOD, section 2)."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import close, configs, images_of, latent_variant_of

from diffguard.diffusion.reference import invert, reconstruct
from diffguard.diffusion.sampler import Sampler
from diffguard.diffusion.schedules import latent_diffusion_schedule
from diffguard.models.gradcam import cam_maps, cam_mask

RUNS = configs("ldm_meta.json")


def runs(kind):
    return [name for name in RUNS if name.startswith(kind + "/")]


def close_latents(found, expected):
    """Relative to the largest magnitude."""
    close(found, expected, 2e-5 * float(expected.abs().max()))


def codes_of(ldm, latents):
    """Indices of the nearest entries of the codebook."""
    autoencoder = ldm.vqvae
    with torch.no_grad():
        return autoencoder.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


def test_schedules(ldm, ldm_expected):
    close(ldm.alphas_cumprod.float().double(), ldm_expected["schedule/alphas_cumprod"].double(), 1e-12)
    found = {m[1] for key in ldm_expected if (m := re.match(r"schedule/S(\d+)/", key))}
    assert found
    for levels in found:
        schedule = latent_diffusion_schedule(ldm.alphas_cumprod, int(levels))
        assert schedule.inversion.timestep.tolist() == ldm_expected[f"schedule/S{levels}/timesteps"].tolist()
        assert schedule.denoising.timestep.tolist() == schedule.inversion.timestep.tolist()
        made = {
            "forward/ddim_alphas": schedule.inversion.alpha_bar_from,
            "forward/ddim_alphas_next": schedule.inversion.alpha_bar_to,
            "sampler/ddim_alphas": schedule.denoising.alpha_bar_from,
            "sampler/ddim_alphas_prev": schedule.denoising.alpha_bar_to,
            "forward/ddim_sqrt_one_minus_alphas": (1 - schedule.inversion.alpha_bar_from).sqrt(),
            # The sampler makes this table in NumPy's float32.
            "sampler/ddim_sqrt_one_minus_alphas": torch.from_numpy(
                np.sqrt(1 - schedule.denoising.alpha_bar_from.float().numpy())
            ),
        }
        for key, expected in ldm_expected.items():
            if key.startswith(f"schedule/S{levels}/") and not key.endswith("timesteps"):
                close(made[key.split("/", 2)[2]], expected, 1e-12)


def test_network(ldm, ldm_expected):
    outputs = [m for key in ldm_expected if (m := re.fullmatch(r"unet/out_t(\d+)_y(\d+)", key))]
    assert outputs
    x = ldm_expected["unet/in"]
    for found in outputs:
        timestep, label = (torch.full((len(x),), int(found[i])) for i in (1, 2))
        with torch.no_grad():
            close(ldm.eps(x, timestep, label), ldm_expected[found[0]], 1e-5)


def test_autoencoder(ldm, ldm_expected):
    images, latents = (ldm_expected["in/x0"] + 1) / 2, ldm_expected["encode/latent"]
    with torch.no_grad():
        close_latents(ldm.encode(images), latents)
        close(ldm.decode(latents) * 2 - 1, ldm_expected["encode/decode_of_latent"], 2e-5)
    assert torch.equal(codes_of(ldm, latents), ldm_expected["encode/codes_of_latent"])


@pytest.mark.parametrize("name", runs("invert"))
def test_inversion(name, ldm, ldm_expected):
    run = RUNS[name]
    schedule = latent_diffusion_schedule(ldm.alphas_cumprod, run["steps"])
    with torch.no_grad():
        latents = ldm.encode((ldm_expected[run["input"]] + 1) / 2)
    label = None if run["label"] is None else ldm_expected[run["label"]]
    stops = list(range(1, schedule.levels + 1))
    ends = invert(ldm, latents, schedule, stops, clip=False, label=label, scale=run["guidance_scale"])
    close_latents(ends[-1].latents, ldm_expected[f"{name}/zT"])
    path = ldm_expected.get(f"{name}/trajectory_sample0")
    if path is not None:
        for end, expected in zip([None, *ends], path, strict=True):
            close_latents(latents[0] if end is None else end.latents[0], expected)


@pytest.mark.parametrize("name", runs("denoise"))
def test_denoising(name, ldm, ldm_expected):
    """From the stored latents; the image is decoded from the stored ones too (see the folder's README)."""
    run = RUNS[name]
    schedule = latent_diffusion_schedule(ldm.alphas_cumprod, run["steps"])
    start = torch.full((len(ldm_expected[run["from"]]),), schedule.levels - 1)
    null = torch.full_like(start, ldm.null_label)
    label = null if run["label"] is None else ldm_expected[run["label"]]
    mask = None if run.get("mask") is None else ldm_expected[run["mask"]].float()
    if mask is not None and mask.shape[-2:] != ldm_expected[run["from"]].shape[-2:]:
        mask = F.interpolate(mask, size=ldm_expected[run["from"]].shape[-2:])
    # At scale 1 the published code ignores the mask; ours never does.
    mask = None if run["guidance_scale"] == 1 else mask
    made = reconstruct(
        ldm, ldm_expected[run["from"]], start, schedule, label, scale=run["guidance_scale"], mask=mask, clip=False
    )
    stored = ldm_expected[f"{name}/latent"]
    close_latents(made, stored)
    with torch.no_grad():
        close((ldm.decode(stored) * 2 - 1).clamp(-1, 1), ldm_expected[f"{name}/image"], 2e-4)
    if f"{name}/codes" in ldm_expected:
        assert torch.equal(codes_of(ldm, stored), ldm_expected[f"{name}/codes"])
    path = ldm_expected.get(f"{name}/trajectory_sample0")
    if path is not None:
        x = ldm_expected[run["from"]][:1]
        close_latents(x[0], path[0])
        for step, expected in enumerate(path[1:]):
            # One move from each stored state.
            k = schedule.levels - 1 - step
            one = reconstruct_one(ldm, path[step][None], k, schedule, label[:1], run["guidance_scale"], mask)
            close_latents(one[0], expected)


def reconstruct_one(ldm, x, k, schedule, label, scale, mask):
    """The denoising move of index k alone."""
    from dataclasses import replace

    from diffguard.diffusion.schedules import Steps

    steps = schedule.denoising
    down = Steps(steps.timestep[k : k + 1], steps.alpha_bar_from[k : k + 1], steps.alpha_bar_to[k : k + 1])
    alone = replace(schedule, denoising=down)
    mask = None if mask is None else mask[:1]
    return reconstruct(ldm, x, torch.zeros(1, dtype=torch.long), alone, label, scale=scale, mask=mask, clip=False)


@pytest.mark.parametrize("name", runs("call"))
def test_whole_calls(name, ldm, ldm_meta, ldm_expected, classifier):
    """Preprocessing, inversion, mask, denoising and decoding through what scoring uses."""
    run = RUNS[name]
    variant = latent_variant_of(run, ldm_meta["config"], ldm.alphas_cumprod, "l1")
    images, label = (ldm_expected[run["input"]] + 1) / 2, ldm_expected[run["label"]]
    if "input_size" in run:
        images = (images_of(ldm_expected, run["input_size"], run["input"]) + 1) / 2
    sampler = Sampler.of(variant, ldm, images.shape[-1])
    with torch.no_grad():
        [end] = sampler.invert(sampler.encode(images), [variant.stop], classifier, label)
    if f"{name}/zT" in ldm_expected:
        close_latents(end.latents, ldm_expected[f"{name}/zT"])
    mask, scale, cut = None, variant.guidance.scale, variant.guidance.cam_cut
    if cut is not None:
        mask = cam_mask(classifier, images, label, cut, tuple(end.latents.shape[-2:]))
    start = sampler.schedule.start(end.level, variant.forback_skip_diff, variant.skip_first_steps)
    made = reconstruct(ldm, end.latents, start, sampler.schedule, label, scale=scale, mask=mask, clip=False)
    with torch.no_grad():
        close(sampler.decode(made) * 2 - 1, ldm_expected[f"{name}/recon"], 2e-4)


def test_cam(ldm_expected, classifier):
    images, label = (ldm_expected["in/x0"] + 1) / 2, ldm_expected["in/label"]
    if "cam/scaled" in ldm_expected:
        close(cam_maps(classifier, images, label), ldm_expected["cam/scaled"], 1e-5)
    for key, expected in ldm_expected.items():
        if m := re.fullmatch(r"cam/binary_cut(-?[\d.]+)(?:_at_latent(\d+))?", key):
            size = int(m[2] or images.shape[-1])
            mask = cam_mask(classifier, images, label, float(m[1]), (size, size))
            # One map for all channels.
            assert torch.equal(mask.expand_as(expected), expected)
