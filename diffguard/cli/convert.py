"""Write a published checkpoint of guided-diffusion or latent diffusion as a folder in Diffusers' layout."""

import argparse
from pathlib import Path
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint", type=Path, help="256x256_diffusion_uncond.pt, cin256-v2's model.ckpt, or one like them"
    )
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images in pixels (256)")
    parser.add_argument(
        "--head-channels", type=int, default=64, help="pixel model: channels of each attention head (64)"
    )
    parser.add_argument("--heads", type=int, default=1, help="latent model: number of attention heads (1)")
    parser.add_argument(
        "--schedule",
        help="noise schedule of its training: linear (default for pixel models), cosine, scaled-linear (for latent)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="timesteps of its training (1000)")
    parser.add_argument(
        "--beta-start", type=float, help="first beta of a linear schedule of 1000 steps (1e-4; latent: 0.0015)"
    )
    parser.add_argument("--beta-end", type=float, help="last beta, likewise (0.02; latent: 0.0195)")


def run(options: argparse.Namespace) -> int:
    """Convert a checkpoint and print what it holds; returns the exit code."""
    from diffguard.models.conversion import Training, convert

    denoiser = convert(
        options.checkpoint,
        options.folder,
        image_size=options.image_size,
        head_channels=options.head_channels,
        heads=options.heads,
        training=Training(options.schedule, options.steps, options.beta_start, options.beta_end),
    )
    parameters = sum(weight.numel() for weight in denoiser.unet.parameters())
    labels = f"{denoiser.num_labels} labels" if denoiser.num_labels else "no labels"
    print(f"{options.folder}: {type(denoiser).__name__}, UNet of {parameters:,} parameters, {labels}")
    config = denoiser.scheduler.config
    print(f"training: {config.num_train_timesteps} steps, {config.beta_schedule}, betas {_betas(config)}")
    if options.schedule is None:
        print("a checkpoint does not hold its schedule; this is the published one, or give --schedule and --steps")
    return 0


def _betas(config: Any) -> str:
    is_linear = "linear" in config.beta_schedule
    return f"{config.beta_start:g} to {config.beta_end:g}" if is_linear else "of the cosine (arXiv 2102.09672)"
