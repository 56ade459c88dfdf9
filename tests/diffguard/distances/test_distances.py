"""Distances: signs, sizes, where weights come from."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from diffguard.distances.functions import check_distances, difference_map, get_distance, perceptual
from diffguard.errors import DataError, SettingError
from diffguard.settings import DISTANCES

BUILT_IN = sorted(set(DISTANCES) - {"lpips", "dists"})


class Half:
    """A distance of one's own."""

    min_size = 32

    def __call__(self, images, others, classifier):
        return (images - others).abs().amax(dim=(1, 2, 3)) / 2


half = Half()


def pictures(side, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, channels, side, side, generator=generator)
    near = (images + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    far = torch.rand(images.shape, generator=generator)
    return images, near, far


@pytest.fixture(scope="module")
def network():
    from torchvision.models import resnet18

    from diffguard.models.classifiers.wrapped import NetworkClassifier

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NetworkClassifier(resnet18(num_classes=10), "layer4")


@pytest.mark.parametrize("name", BUILT_IN)
def test_nothing_is_nearest_and_noise_is_far(name, network):
    images, near, far = pictures(48)
    distance = get_distance(name)
    same, close, away = (distance(images, other, network) for other in (images, near, far))
    assert same.shape == (4,)
    assert torch.allclose(same, torch.zeros(4), atol=1e-5)
    assert (close > 0).all()
    assert (away > close).all()


@pytest.mark.parametrize("name", [name for name in BUILT_IN if DISTANCES[name].min_size > 1])
def test_the_smallest_image_that_is_declared_is_the_smallest_that_works(name, network):
    least = DISTANCES[name].min_size
    images, near, _ = pictures(least)
    assert torch.isfinite(get_distance(name)(images, near, network)).all()
    check_distances([name], least)
    with pytest.raises(SettingError, match=f"{name} takes images from {least}x{least} pixels up; these are"):
        check_distances(["l1", name], least - 1)


def test_l2_is_a_norm_and_l1_a_mean(network):
    images, others = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert float(get_distance("l1")(images, others, network)) == 0.5
    assert float(get_distance("l2")(images, others, network)) == pytest.approx(0.5 * 48**0.5)


@pytest.mark.parametrize("name", ["logits", "features"])
def test_normalized_are_differences_of_directions(name, network):
    images, near, far = pictures(32)
    of = network if name == "logits" else network.features
    with torch.no_grad():
        vectors = [of(each).double().numpy() for each in (images, near, far)]
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in vectors]
    distance = get_distance(f"{name}-normalized")
    for others, unit in ((near, units[1]), (far, units[2])):
        found = distance(images, others, network)
        assert np.allclose(found, np.abs(units[0] - unit).sum(axis=1), rtol=1e-3, atol=1e-6)
        assert (found <= 2 * unit.shape[1] ** 0.5).all()


class Fixed:
    """A classifier with the same logits and features for an image: its pixels, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, images):
        return self.features(images)

    def features(self, images):
        return images.flatten(1) * self.factor


@pytest.mark.parametrize("name", ["logits-normalized", "features-normalized"])
def test_normalized_reach_their_largest_value_and_ignore_scale(name):
    images, distance = torch.ones(1, 1, 2, 2), get_distance(name)
    assert float(distance(images, -images, Fixed(1))) == pytest.approx(2 * 4**0.5)
    one, other = torch.tensor([[1.0, 0], [0, 0]])[None, None], torch.tensor([[0, 3.0], [0, 0]])[None, None]
    assert [float(distance(one, other, Fixed(factor))) for factor in (0.1, 50)] == pytest.approx([2.0, 2.0])


def test_a_difference_is_drawn_from_what_a_score_compares_with():
    image, reconstruction, unconditional = (torch.full((1, 2, 2), value) for value in (0.2, 0.5, 0.1))
    drawn = {
        against: float(difference_map(image, reconstruction, unconditional, against).mean())
        for against in ("input", "unconditional", "gain")
    }
    assert drawn == pytest.approx({"input": 0.6, "unconditional": 0.8, "gain": 0.4})
    assert float(difference_map(image, unconditional, reconstruction, "gain").max()) == 0
    assert float(difference_map(image, torch.ones(1, 2, 2), unconditional, "input").min()) == 1


def test_a_distance_of_ones_own_and_its_smallest_image(network):
    images, _, far = pictures(32)
    assert (get_distance(f"{__name__}:half")(images, far, network) <= 0.5).all()
    with pytest.raises(SettingError, match="test_distances:half takes images from 32x32"):
        check_distances([f"{__name__}:half"], 8)
    with pytest.raises(SettingError, match="'l7' is not one of"):
        get_distance("l7")
    with pytest.raises(SettingError, match="no_such_module"):
        get_distance("no_such_module:thing")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files in the published ones' format, with random weights: VGG-16's state dict, and piq's."""
    from torchvision.models import vgg16

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = vgg16(weights=None, init_weights=False)
        for layer in network.features:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
    torch.save(network.state_dict(), folder / "vgg16-397923af.pth")
    channels = [3, 64, 128, 256, 512, 512]
    even = torch.full((1, sum(channels), 1, 1), 1 / (2 * sum(channels)))
    torch.save({"alpha": even, "beta": even}, folder / "dists_weights.pt")
    torch.save([torch.full((1, width, 1, 1), 1 / width) for width in channels[1:]], folder / "lpips_weights.pt")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_perceptual_distances_from_a_folder_of_weights(channels, weights, monkeypatch, network):
    monkeypatch.setenv(perceptual.WEIGHTS_VARIABLE, str(weights))
    images, near, far = pictures(32, channels)
    for name in ("dists", "lpips"):
        distance = get_distance(name)
        assert torch.allclose(distance(images, images, network), torch.zeros(4), atol=1e-4)
        assert (distance(images, far, network) > distance(images, near, network)).all()
        least = DISTANCES[name].min_size
        assert torch.isfinite(distance(images[..., :least, :least], far[..., :least, :least], network)).all()


def test_missing_weights_say_what_to_download_to_where(tmp_path, monkeypatch, network):
    images, near, _ = pictures(32)
    monkeypatch.setenv(perceptual.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as error:
        get_distance("dists")(images, near, network)
    for part in ("dists", "https://download.pytorch.org/models/vgg16-397923af.pth", "dists_weights.pt", str(tmp_path)):
        assert part in str(error.value)


def test_offline_without_a_folder_the_error_is_the_same_kind(tmp_path):
    """In a process of its own whose network is nowhere: a proxy that refuses every connection."""
    code = (
        "import torch; from diffguard.distances.functions import get_distance; from diffguard.errors import DataError\n"
        "x = torch.rand(1, 3, 32, 32)\n"
        "try: get_distance('lpips')(x, x, None)\n"
        "except DataError as error: print(error)"
    )
    environment = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    last = done.stdout.strip().splitlines()[-1]  # torch's hub says first what it downloads
    assert "the weights of lpips cannot be loaded" in last
    assert str(tmp_path / "hub" / "checkpoints") in last
