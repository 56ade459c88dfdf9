"""The captured models in lower precision, channels-last and compiled: the same stops, scores within 5 %.

On CPUs without native 16-bit convolutions the pixel model takes seconds an image and step, so it runs
at half its size, on few steps. Compiling takes minutes: `pytest -m slow tests/parity`.
"""

import json

import pytest
import torch
from published import FOLDER

from diffguard.diffusion.sampler import Sampler
from diffguard.engine import Request, score_batch
from diffguard.models.conversion import from_checkpoint
from diffguard.settings import AdaptiveStop, LabelGuidance, NoGuidance, Variant


@pytest.fixture(scope="module")
def images(gdm_expected):
    whole = (gdm_expected["in/x0"][:2] + 1) / 2
    return torch.nn.functional.interpolate(whole, size=32, mode="bilinear", antialias=True)


def load(model, gdm_meta):
    if model == "pixel":
        heads = gdm_meta["overrides_all"]["num_head_channels"]
        return from_checkpoint(FOLDER / "gdm_unet.safetensors", image_size=32, head_channels=heads)
    unet = json.loads((FOLDER / "ldm_config.json").read_text())["unet_config"]["params"]
    return from_checkpoint(FOLDER / "ldm_weights.safetensors", image_size=32, heads=unet["num_heads"])


@pytest.fixture(scope="module", params=["pixel", "latent"])
def setting(request, images, gdm_meta, classifier):
    """A denoiser, a variant with a threshold between two samples' similarities, and its scores in float32."""
    denoiser = load(request.param, gdm_meta)
    guidance = NoGuidance() if request.param == "pixel" else LabelGuidance(scale=2.0)
    grid = "guided-diffusion" if request.param == "pixel" else "latent-diffusion"
    plain = Variant(grid=grid, levels=10, stop=3, guidance=guidance, distance="l1", clip=request.param == "pixel")
    sampler = Sampler.of(plain, denoiser, 32)
    with torch.no_grad():
        latents = sampler.encode(images)
        [there] = sampler.invert(latents, [2], classifier, torch.zeros(2).long())
        between = float(sampler.similarity("psnr", classifier)(there.latents, latents).mean())
    stop = AdaptiveStop(max_level=3, thresholds={"psnr": between})
    variant = plain.model_copy(update={"stop": stop})
    [exact] = score_batch(images, denoiser, [Request(classifier, variant)])
    assert len(set(exact.level.tolist())) == 2
    return request.param, variant, exact


@pytest.mark.parametrize(
    "path", ["float16", "bfloat16", "channels_last", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_the_same_stops_and_nearly_the_same_scores(path, setting, images, gdm_meta, classifier):
    model, variant, exact = setting
    denoiser = load(model, gdm_meta)
    if path == "channels_last":
        denoiser.channels_last()
    elif path == "compiled":
        denoiser.compile()
    else:
        variant = variant.model_copy(update={"precision": path})
    [found] = score_batch(images, denoiser, [Request(classifier, variant)])
    assert torch.equal(found.level, exact.level)
    tolerance = 0.05 if path.endswith("float16") else 1e-4
    assert torch.allclose(found.score, exact.score, rtol=tolerance), (found.score, exact.score)
