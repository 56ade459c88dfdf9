import pytest
import torch
from PIL import Image

from diffguard.cli import read_image
from diffguard.errors import DataError
from diffguard.sizing import Sizing


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
