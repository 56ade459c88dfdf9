"""Tiny models with fixed random weights; nothing here is trained."""

import pytest
import torch

from diffguard.classifiers import ConvClassifier
from diffguard.denoisers import PixelDenoiser


@pytest.fixture(scope="session")
def denoiser() -> PixelDenoiser:
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=7,
        )
    return PixelDenoiser(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.fixture(scope="session")
def classifier() -> ConvClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ConvClassifier(num_classes=6, width=4).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))
