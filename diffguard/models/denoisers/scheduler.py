"""The noise schedule of a denoiser's training, from the scheduler's configuration beside it.

A scheduler's class says how its pipeline samples; of most classes the training behind it is the same discrete
variance-preserving diffusion (arXiv 2006.11239), told by its betas. Others (flow matching, EDM, consistency models)
are another thing, and their networks predict something else.
"""

import json
from pathlib import Path
from typing import Any

from diffguard.errors import DataError
from diffguard.utils.text import first_line

CONFIG_FILE = "scheduler_config.json"

_LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
DISCRETE: dict[str, dict[str, float]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMInverseScheduler": {},
    "PNDMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": _LATENT_BETAS,
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "SASolverScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": _LATENT_BETAS,
    "LMSDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": _LATENT_BETAS,
    "KDPM2AncestralDiscreteScheduler": _LATENT_BETAS,
    "RePaintScheduler": {},
}
"""Classes of Diffusers whose training is given by betas, with their defaults where these are not DDPM's."""

_TRAINING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
MOST_STEPS = 100_000


def open_scheduler(folder: Path) -> Any:
    """The Diffusers scheduler (DDPM) of the training that a folder's scheduler is of.

    Raises:
        DataError: it is damaged, or of no discrete variance-preserving diffusion.
    """
    from diffusers import DDPMScheduler

    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not the configuration of a scheduler ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: not the configuration of a scheduler")
    name = config.get("_class_name", "DDPMScheduler" if "beta_schedule" in config else None)
    if name not in DISCRETE:
        raise DataError(
            f"{path}: {name} is of no discrete variance-preserving diffusion (DDPM, DDIM and alike), which this method "
            "inverts; choose a model that was trained as one"
        )
    if config.get("use_flow_sigmas"):
        raise DataError(f"{path}: use_flow_sigmas: the model was trained by flow matching, which is another diffusion")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if not isinstance(steps, int) or not 2 <= steps <= MOST_STEPS:
        raise DataError(f"{path}: num_train_timesteps: {steps!r} is not within 2..{MOST_STEPS}")
    if betas is not None and (not isinstance(betas, list) or len(betas) != steps):
        raise DataError(f"{path}: trained_betas: not a list of {steps} numbers, one a step")
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise DataError(
            f"{path}: rescale_betas_zero_snr with prediction_type epsilon: at the last step the noise tells nothing "
            "of the image; such a model is trained with v_prediction"
        )
    training = {key: config[key] for key in (*_TRAINING, "variance_type", "clip_sample") if key in config}
    rescaled = bool(config.get("rescale_betas_zero_snr", False))
    try:
        scheduler = DDPMScheduler(**{**DISCRETE[name], **training}, rescale_betas_zero_snr=rescaled)
    except Exception as error:  # whatever Diffusers raises for a value of the wrong kind
        raise DataError(f"{path}: no schedule can be made of it ({first_line(error)})") from None
    alphas = scheduler.alphas_cumprod.double()
    if not bool(((alphas >= 0) & (alphas < 1)).all() and (alphas.diff() < 0).all()):
        raise DataError(
            f"{path}: its betas are not all numbers between 0 and 1, by which noise would grow at each step"
        )
    return scheduler
