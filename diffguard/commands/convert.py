"""Write a published checkpoint of guided-diffusion or latent diffusion as a folder in Diffusers' layout."""

import argparse
from pathlib import Path

HELP = "write a published checkpoint as a folder in Diffusers' layout"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, help="256x256_diffusion_uncond.pt, cin256-v2's model.ckpt, or alike")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images in pixels (256)")
    parser.add_argument("--head-channels", type=int, default=64, help="pixel model: channels an attention head (64)")
    parser.add_argument("--heads", type=int, default=1, help="latent model: attention heads (1)")


def run(options: argparse.Namespace) -> int:
    """Convert a checkpoint and say what it was; returns the exit code."""
    from diffguard.convert import convert

    denoiser = convert(
        options.checkpoint,
        options.folder,
        image_size=options.image_size,
        head_channels=options.head_channels,
        heads=options.heads,
    )
    parameters = sum(each.numel() for each in denoiser.unet.parameters())
    labels = f"{denoiser.num_labels} labels" if denoiser.num_labels else "no labels"
    print(f"{options.folder}: {type(denoiser).__name__}, UNet of {parameters:,} parameters, {labels}")
    return 0
