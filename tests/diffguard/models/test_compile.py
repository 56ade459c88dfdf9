import pytest
import torch

from diffguard.models.denoisers.pixel import PixelDenoiser


@pytest.mark.slow
def test_a_compiled_denoiser_predicts_the_same_noise(denoiser):
    """The whole of torch.compile, on the smallest network; the captured ones are in tests/parity."""
    compiled = PixelDenoiser(type(denoiser.unet).from_config(denoiser.unet.config), denoiser.scheduler)
    compiled.unet.load_state_dict(denoiser.unet.state_dict())
    x, label = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    with torch.no_grad():
        plain = denoiser.eps(x, 100 * label, label)
        fast = compiled.compile().eps(x, 100 * label, label)
    assert torch.allclose(fast, plain, atol=1e-5)
