"""Speed and memory of the published architectures at full size, with random weights.

    python experiments/published_models.py pixel --precision bfloat16 --compile --batch 8

One network evaluation of a batch is timed (the median of several), and what the published settings
need of them follows: the pixel model inverts in at most 90 steps and denoises twice in at most 92, the
latent model inverts in 25 and denoises in 25 of twice the batch. Gradients of the classifier, the
autoencoder and distances are not in it.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from diffguard.models.conversion import PUBLISHED_LATENT, PUBLISHED_PIXEL, latent_config, pixel_config
from diffguard.models.denoisers.base import in_precision
from diffguard.models.denoisers.latent import LatentDenoiser, label_embedder
from diffguard.models.denoisers.noise_schedule import make_scheduler
from diffguard.models.denoisers.pixel import PixelDenoiser

EVALUATIONS = {"pixel": 90 + 2 * 92, "latent": 25 + 2 * 25}
"""Evaluations an image at most, at the published settings."""


def build(family: str, device: torch.device) -> tuple[PixelDenoiser | LatentDenoiser, tuple[int, int, int]]:
    """The denoiser and the shape of its latents."""
    from diffusers import UNet2DConditionModel, UNet2DModel, VQModel

    with device:
        if family == "pixel":
            unet = UNet2DModel(**pixel_config(PUBLISHED_PIXEL, 256, 64))
            return PixelDenoiser(unet, make_scheduler("linear", 1e-4, 0.02)), (3, 256, 256)
        unet = UNet2DConditionModel(**latent_config(PUBLISHED_LATENT, 64, 1))
        autoencoder = VQModel(
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            num_vq_embeddings=8192,
        )
        embedder = label_embedder(torch.randn(1001, 512))
    return LatentDenoiser(unet, autoencoder, embedder, make_scheduler("scaled_linear", 0.0015, 0.0195)), (3, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(EVALUATIONS))
    parser.add_argument("--precision", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser, shape = build(options.family, device)
    denoiser.channels_last()
    if options.compile:
        denoiser.compile()
    lowered = in_precision(denoiser, options.precision)
    x = torch.randn(options.batch, *shape, device=device)
    timestep = torch.arange(options.batch, device=device)
    seconds = [evaluate(lowered, x, timestep) for _ in range(options.repeats + 1)][1:]
    median = statistics.median(seconds)
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else "not measured"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.family} {options.precision}{' compiled' if options.compile else ''}, batch {options.batch}, {name}: "
        f"{median:.3f} s an evaluation (least {min(seconds):.3f}), {options.batch / median:.2f} image-evaluations/s, "
        f"{options.batch / median / EVALUATIONS[options.family]:.4f} images/s at the published settings, "
        f"peak memory {memory}"
    )


@torch.no_grad()
def evaluate(denoiser: PixelDenoiser | LatentDenoiser, x: Tensor, timestep: Tensor) -> float:
    """Seconds of one evaluation."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    denoiser.eps(x, timestep, timestep)
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
