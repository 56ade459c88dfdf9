"""The published code's configurations as variants, and the captured runs' stand-in for DISTS."""

import json
import os
from pathlib import Path

from diffguard.diffusion.schedules import latent_diffusion_schedule
from diffguard.settings import AdaptiveStop, ClassifierGuidance, LabelGuidance, Variant

FOLDER = Path(os.environ.get("DIFFGUARD_PARITY") or Path(__file__).resolve().parents[3] / "shared" / "parity")
STAND_IN = "published:mean_abs"
_KNOWN = {
    "image_size", "input_size", "num_channels", "channel_mult", "attention_resolutions", "num_head_channels",
    "use_fp16", "timestep_respacing", "cutouts_size", "cutouts_num", "early_stop_steps", "batch_size",
    "early_stop_metric", "early_stop_thresh", "no_x0_hat", "process_method", "clip_denoised",
    "forback_skip_diff", "skip_first_steps", "classifier_scale", "uncond_aux", "model",
    "guidance_scale",
}  # fmt: skip


_KNOWN_LATENT = {
    "steps", "guidance_scale", "cam_cut", "process_method", "input_size", "uncond_aux", "model", "input", "label",
}  # fmt: skip


def configs(name: str, key: str = "configs") -> dict:
    """A section of a JSON file; empty where the folder is absent, so that tests can be collected."""
    path = FOLDER / name
    return json.loads(path.read_text())[key] if path.is_file() else {}


def images_of(expected: dict, size: int, name: str = "in/x0"):
    """A folder's images of this side: under their own name where there is one of several sides."""
    own = f"{name}_{size}"
    images = expected[own if own in expected else name]
    assert images.shape[-1] == size, f"{name} is of {images.shape[-1]} pixels, and there is no {own}"
    return images


AMPLIFYING = 14
"""From this stop index on guided reconstructions amplify rounding beyond any tolerance (the folder's README)."""


def close(found, expected, atol):
    worst = float((found - expected).abs().max())
    assert worst <= atol, f"differs by {worst:.2e}, more than {atol:.0e}"


def mean_abs(images, others, classifier):
    """The captured runs' "dists": similarity 1 - mean |a - b| per image."""
    return (images - others).abs().flatten(1).mean(dim=1)


def variant_of(config: dict, defaults: dict, seed: int, distance: str = "l1") -> Variant:
    """A run of the pixel model, as the published configuration file would say it."""
    run = {**defaults, **config}
    unknown = set(run) - _KNOWN
    assert not unknown, f"settings that this test does not know: {unknown}"
    levels = int(run["timestep_respacing"].removeprefix("ddim"))
    last = levels - run["early_stop_steps"]
    metrics = run.get("early_stop_metric") or []
    names = [STAND_IN if name == "dists" else name for name in metrics]
    thresholds = run.get("early_stop_thresh")
    stop = AdaptiveStop(max_level=last, thresholds=dict(zip(names, thresholds, strict=True))) if names else last
    cutouts = run.get("cutouts_num", 8)
    return Variant(
        grid="guided-diffusion",
        levels=levels,
        stop=stop,
        forback_skip_diff=run.get("forback_skip_diff", 3),
        skip_first_steps=run.get("skip_first_steps", 0),
        guidance=ClassifierGuidance(
            scale=run.get("classifier_scale", run.get("guidance_scale", 3.0)),
            cutouts=None if cutouts < 1 else cutouts,
            cutout_size=None if cutouts < 1 else run["cutouts_size"],
            seed=seed,
            x0_estimate=not run.get("no_x0_hat", False),
        ),
        process_method=run.get("process_method", "resize"),
        distance=distance,
        against="unconditional" if run.get("uncond_aux", True) else "input",
        clip=run.get("clip_denoised", True),
    )


def latent_variant_of(config: dict, captured: dict, alphas_cumprod, distance: str) -> Variant:
    """A run of the latent model.

    Args:
        captured: the settings that ldm_meta.json gives for all runs.
        alphas_cumprod: of the denoiser; where K does not divide its steps, inversion makes more than K moves.
    """
    defaults = {
        "steps": captured.get("ddim_steps", 25),
        "guidance_scale": captured.get("denoise_guidance_scale", 10.0),
        "cam_cut": captured.get("cam_cut"),
    }
    run = {**defaults, **config}
    unknown = set(run) - _KNOWN_LATENT
    assert not unknown, f"settings that this test does not know: {unknown}"
    levels, scale = run["steps"], run["guidance_scale"]
    return Variant(
        grid="latent-diffusion",
        levels=levels,
        stop=latent_diffusion_schedule(alphas_cumprod, levels).levels,
        # At scale 1 the published code ignores the mask; ours never does.
        guidance=LabelGuidance(scale=scale, cam_cut=None if scale == 1 else run["cam_cut"]),
        process_method=run.get("process_method", "resize"),
        distance=distance,
        against="unconditional" if run.get("uncond_aux") else "input",
        clip=False,
    )
