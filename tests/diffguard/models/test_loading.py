import pytest
import torch

from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.settings import Augmentation, ClassifierTraining, DenoiserTraining
from diffguard.training import train_classifier, train_denoiser
from diffguard.training.augmentation import augment
from diffguard.utils.importing import import_object


def test_classifier_comes_back_from_its_file(tmp_path, classifier, images):
    save_classifier(classifier, tmp_path / "c.safetensors")
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert torch.equal(loaded(images), classifier(images))
    assert torch.allclose(classifier.head(classifier.features(images)), classifier(images))


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_file_that_is_no_classifier_is_named(tmp_path, content):
    path = tmp_path / "c.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.safetensors"):
        load_classifier(path)


def test_an_unknown_import_is_named():
    with pytest.raises(SettingError, match="no_such_module:Name"):
        import_object("no_such_module:Name")


def test_training_learns_reports_and_repeats(tmp_path):
    labels = torch.arange(64) % 2
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    images[labels == 1, :, :4] += 0.7
    seen = []
    settings = ClassifierTraining(epochs=8, batch_size=16)
    one = train_classifier(images, labels, 2, settings, 0, lambda at: seen.append((at.step, at.steps)))
    assert (one(images).argmax(1) == labels).float().mean() > 0.95
    assert seen[-1] == (32, 32)
    again = train_classifier(images, labels, 2, settings, 0, lambda *_: None)
    assert torch.equal(one(images), again(images))
    other = train_classifier(images, labels, 2, settings, 1, lambda *_: None)
    assert not torch.equal(one(images), other(images))


def test_denoiser_learns_and_comes_back_from_its_folder(tmp_path):
    images = torch.zeros(32, 1, 8, 8)
    images[::2, :, 2:6, 2:6] = 1
    labels = torch.arange(32) % 2
    losses = []
    settings = DenoiserTraining(channels=(8, 16), norm_groups=4, iterations=120, batch_size=16, ema=0.9)
    denoiser = train_denoiser(images, labels, 2, settings, 0, lambda step: losses.append(step.loss))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    save_denoiser(denoiser, tmp_path / "d")
    loaded = load_denoiser(tmp_path / "d")
    x, t, y = images * 2 - 1, torch.full((32,), 99), labels
    assert torch.allclose(loaded.eps(x, t, y), denoiser.eps(x, t, y), atol=1e-6)
    assert (loaded.num_labels, loaded.null_label, loaded.image_shape) == (2, 2, (1, 8, 8))
    (tmp_path / "d/unet/diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"diffusion_pytorch_model.safetensors: not a file of weights"):
        load_denoiser(tmp_path / "d")
    with pytest.raises(DataError, match="no denoiser here"):
        load_denoiser(tmp_path / "nowhere")


def test_augmentation_shifts_by_no_more_than_it_may():
    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 3:5, 3:5] = 1
    moved = augment(images, Augmentation(shift=1.0), torch.Generator().manual_seed(0))
    place = torch.arange(8.0)
    center = (moved * place).sum((1, 2, 3)) / moved.sum((1, 2, 3))
    assert (center - 3.5).abs().max() <= 1.001
    assert (center - 3.5).abs().max() > 0.8
