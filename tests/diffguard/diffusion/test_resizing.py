import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffguard.diffusion.resizing import Sizing
from diffguard.diffusion.sampler import Sampler
from diffguard.errors import DataError
from diffguard.images import read_image
from diffguard.settings import NoGuidance, Variant


@pytest.mark.parametrize(("input_size", "model_size"), [(8, 12), (7, 12), (12, 12)])
def test_padding_is_black_and_comes_off_again(input_size, model_size):
    images = torch.rand(2, 3, input_size, input_size) + 0.1
    sizing = Sizing("pad", input_size, model_size)
    padded = sizing.to_model(images)
    assert padded.shape == (2, 3, model_size, model_size)
    assert padded.sum() == pytest.approx(float(images.sum()), rel=1e-5)
    assert torch.equal(sizing.to_input(padded), images)
    assert torch.equal(sizing.crop(padded), images)


def test_resizing_goes_there_and_comes_back():
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    sizing = Sizing("resize", 8, 16)
    assert sizing.to_model(ramp).shape == (1, 1, 16, 16)
    assert torch.allclose(sizing.to_input(sizing.to_model(ramp)), ramp, atol=0.05)
    assert sizing.crop(ramp) is ramp


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(DataError, match="set process_method to resize or pad"):
        Sizing("none", 8, 16)
    with pytest.raises(DataError, match="cannot be padded"):
        Sizing("pad", 16, 8)


def test_reading_resizes_the_short_side_and_cuts_the_middle_out(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 8, 20))
    image.save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", 3, None, None).shape == (3, 20, 40)
    cut = read_image(tmp_path / "wide.png", 3, 10, 8)
    assert cut.shape == (3, 8, 8)
    assert float(cut.min()) == 1.0  # the black edge is outside


class Bright:
    """A denoiser whose images leave [0, 1] on both sides; latents are images, or half as large."""

    def __init__(self, latent):
        self.latent = latent
        self.image_shape = (1, 8, 8)
        self.alphas_cumprod = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)

    def decode(self, latents):
        images = F.interpolate(latents, scale_factor=2) if self.latent else latents
        return images * 3 - 1


@pytest.mark.parametrize("latent", [True, False])
def test_a_latent_models_image_is_clamped_before_it_is_resized_and_a_pixel_models_after(latent):
    """As published: METHOD of the latent model, and of the pixel model."""
    denoiser = Bright(latent)
    variant = Variant(
        grid="latent-diffusion", levels=5, stop=5, process_method="resize", distance="l1", guidance=NoGuidance()
    )
    sampler = Sampler.of(variant, denoiser, 6)
    latents = torch.rand(2, 1, *((4, 4) if latent else (8, 8)), generator=torch.Generator().manual_seed(0))
    decoded = denoiser.decode(latents)
    before = F.interpolate(decoded.clamp(0, 1), size=6, mode="bilinear", align_corners=False)
    after = F.interpolate(decoded, size=6, mode="bilinear", align_corners=False).clamp(0, 1)
    assert (before - after).abs().max() > 0.05
    assert torch.allclose(sampler.decode(latents), before if latent else after)
