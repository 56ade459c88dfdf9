"""Training that is killed, short of time, or of any size ends with a model all the same."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.classifiers.small import WhitenedClassifier
from diffguard.models.gradcam import cam_maps
from diffguard.settings import RECIPES, Augmentation, ClassifierTraining, DenoiserTraining, parse_settings
from diffguard.training import train_classifier, train_denoiser, untrained_classifier
from diffguard.training.augmentation import augment
from diffguard.training.previews import draw_samples, sample_grid

TINY = DenoiserTraining(
    channels=(8, 16),
    norm_groups=4,
    iterations=40,
    batch_size=8,
    checkpoint_minutes=1e-9,  # at every step
    augmentation=Augmentation(flip=True),
)


def squares(side=8):
    """Two classes of RGB images: a bright square in the middle, or none."""
    images = torch.zeros(20, 3, side, side, dtype=torch.uint8)
    images[::2, :, 2:6, 2:6] = 255
    return images, torch.arange(20) % 2


def weights(denoiser):
    return torch.cat([each.flatten() for each in denoiser.unet.parameters()])


def train_there(path, started):
    torch.set_num_threads(1)
    images, labels = squares()

    def progress(step):
        started.set()
        time.sleep(0.05)

    train_denoiser(images, labels, 2, TINY, 0, progress, checkpoint=path)


def test_a_killed_training_ends_as_if_it_had_never_stopped(tmp_path):
    images, labels = squares()
    undisturbed = train_denoiser(images, labels, 2, TINY, 0, lambda *_: None)
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=train_there, args=(tmp_path / "c.pt", started))
    process.start()
    assert started.wait(120)
    while not (tmp_path / "c.pt").is_file():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    steps = []
    resumed = train_denoiser(images, labels, 2, TINY, 0, lambda at: steps.append(at.step), checkpoint=tmp_path / "c.pt")
    assert 1 < steps[0] <= 40
    assert steps[-1] == 40
    assert torch.allclose(weights(resumed), weights(undisturbed), atol=1e-6)


@pytest.mark.parametrize(("side", "channels", "more"), [(9, (8, 16), 1), (18, (8, 16, 16), 2), (9, (8, 8, 8, 8), 7)])
def test_a_side_that_cannot_be_halved_as_often_as_there_are_levels(side, channels, more):
    images, labels = squares()
    images = torch.nn.functional.pad(images, (0, side - 8, 0, side - 8))
    settings = TINY.model_copy(update={"channels": channels, "iterations": 2})
    denoiser = train_denoiser(images, labels, 2, settings, 0, lambda *_: None)
    x, timestep, labels = torch.rand(3, 3, side, side), torch.tensor([0, 5, 900]), torch.tensor([0, 1, 2])
    predicted = denoiser.eps(x, timestep, labels)
    larger = torch.nn.functional.pad(x, (0, more, 0, more))
    assert torch.equal(predicted, denoiser.eps(larger, timestep, labels)[..., :side, :side])


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    images, labels = squares()
    train_denoiser(images, labels, 2, TINY, 0, lambda *_: None, checkpoint=tmp_path / "c.pt")
    other = TINY.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(DataError, match=r"c\.pt: this training was begun with other settings"):
        train_denoiser(images, labels, 2, other, 0, lambda *_: None, checkpoint=tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"c\.pt: not a checkpoint"):
        train_denoiser(images, labels, 2, TINY, 0, lambda *_: None, checkpoint=tmp_path / "c.pt")


def test_the_time_budget_ends_it_and_it_has_learned(tmp_path):
    images, labels = squares()
    settings = TINY.model_copy(update={"iterations": 10**6, "minutes": 0.04, "checkpoint_minutes": 0.01})
    losses, seen = [], []
    began = time.monotonic()
    train_denoiser(
        images,
        labels,
        2,
        settings,
        0,
        lambda step: losses.append(step.loss),
        checkpoint=tmp_path / "c.pt",
        preview=lambda step, denoiser: seen.append((step, weights(denoiser))),
    )
    assert 2.4 <= time.monotonic() - began < 20
    assert sum(losses[-10:]) < sum(losses[:10])
    assert len(seen) >= 3
    assert seen[-1][0] == len(losses)
    assert not torch.equal(seen[0][1], seen[-1][1])


def test_attention_and_a_recipe_with_changes():
    settings = parse_settings(DenoiserTraining, {"recipe": "cifar10-cfg", "minutes": 5}, "x")
    assert settings == RECIPES["cifar10-cfg"].model_copy(update={"minutes": 5})
    images, labels = squares()
    small = settings.model_copy(update={"channels": (16, 32, 32), "norm_groups": 8, "iterations": 2, "batch_size": 4})
    denoiser = train_denoiser(images, labels, 2, small, 0, lambda *_: None)
    assert any("attentions" in name for name, _ in denoiser.unet.named_parameters())
    samples = draw_samples(denoiser, torch.tensor([0, 1, 1]), steps=3)
    assert samples.shape == (3, 3, 8, 8)
    assert 0 <= samples.min() <= samples.max() <= 1
    assert sample_grid(denoiser, rows=2, steps=2).size == (2 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "cifar11"}, "recipe: 'cifar11' is not one of cifar10-cfg"),
        ({"attention": [2]}, "attention: 2 is not an index of channels, which has 2"),
        ({"channels": [30, 60]}, "channels: 30 is not a multiple of norm_groups, 8"),
        ({"iterations": "many"}, "iterations"),
    ],
)
def test_a_wrong_training_setting_is_named(values, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(DenoiserTraining, values, "x")


def test_a_residual_classifier_learns_and_comes_back(tmp_path):
    images, labels = squares()
    settings = ClassifierTraining(width=4, blocks=(1, 1), epochs=30, batch_size=10, augmentation=Augmentation(crop=1))
    classifier = train_classifier(images, labels, 2, settings, 0, lambda *_: None)
    found = classifier(images.float() / 255)
    assert (found.argmax(dim=1) == labels).all()
    save_classifier(classifier, tmp_path / "c.safetensors")
    assert torch.equal(load_classifier(tmp_path / "c.safetensors")(images.float() / 255), found)


def test_a_whitened_classifier_learns_and_comes_back(tmp_path):
    images, labels = squares(16)
    settings = ClassifierTraining(stages=(8, 16), epochs=30, batch_size=10, label_smoothing=0.2, optimizer="muon")
    classifier = train_classifier(images, labels, 2, settings, 0, lambda *_: None)
    floats = images.float() / 255
    found = classifier(floats)
    assert (found.argmax(dim=1) == labels).all()
    save_classifier(classifier, tmp_path / "c.safetensors")
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert torch.equal(loaded(floats), found)
    assert torch.allclose(loaded.head(loaded.features(floats)), found)
    assert cam_maps(loaded, floats[:3], labels[:3]).shape == (3, 16, 16)
    # What is not trained is as it was computed of these images.
    before = untrained_classifier((3, 16, 16), 2, settings, 0, classifier.mean, classifier.std)
    before.whiten(floats)
    assert torch.equal(before.whitening, classifier.whitening)


def test_whitening_makes_patches_uncorrelated_and_both_signs():
    images = torch.rand(50, 3, 9, 9, generator=torch.manual_seed(0)).cumsum(dim=3) / 9
    classifier = WhitenedClassifier(2, (8,), mean=float(images.mean()), std=float(images.std()))
    classifier.whiten(images)
    seen = torch.nn.functional.conv2d((images - classifier.mean) / classifier.std, classifier.whitening)
    assert seen.shape == (50, 24, 8, 8)
    assert torch.equal(seen[:, :12], -seen[:, 12:])
    values = seen[:, :12].transpose(0, 1).flatten(1)
    moments = values @ values.T / values.shape[1]
    off = moments - torch.diag(moments.diag())
    assert off.abs().max() < 1e-3
    assert 0.5 < moments.diag().min() <= moments.diag().max() < 1.001


def test_stages_begin_as_the_identity():
    classifier = WhitenedClassifier(2, (30, 40))
    for stage, channels in zip(classifier.stages, (24, 30), strict=True):
        maps = torch.rand(2, channels, 8, 8, generator=torch.manual_seed(0))
        assert torch.allclose(stage[0](maps)[:, :channels], maps)
        wide = torch.rand(2, stage[4].in_channels, 4, 4, generator=torch.manual_seed(1))
        assert torch.allclose(stage[4](wide), wide)


@pytest.mark.parametrize(("stages", "is_channels_last"), [((8,), True), ((8, 4), False)])
def test_maps_are_channels_last_unless_that_corrupts_memory(stages, is_channels_last):
    classifier, seen = WhitenedClassifier(2, stages), []
    classifier.stages.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    classifier(torch.rand(2, 3, 16, 16))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == is_channels_last


def test_images_of_one_colour_cannot_be_whitened():
    settings = ClassifierTraining(stages=(8,), epochs=1, batch_size=4)
    with pytest.raises(SettingError, match="stages: the images are all of one colour"):
        train_classifier(torch.full((8, 3, 8, 8), 0.5), torch.arange(8) % 2, 2, settings, 0, lambda *_: None)


def test_what_is_written_of_a_classifier_is_read_again():
    for settings in ({"stages": [8, 16]}, {"blocks": [1]}, {"patch": 2, "depth": 3}, {}):
        spec = parse_settings(ClassifierTraining, settings, "x")
        assert parse_settings(ClassifierTraining, spec.model_dump(mode="json"), "x") == spec


def test_a_term_is_added_to_the_loss():
    images, labels = squares()
    few = TINY.model_copy(update={"iterations": 3})

    def trained(term):
        return weights(train_denoiser(images, labels, 2, few, 0, lambda *_: None, term=term))

    seen = []

    def term(denoiser):
        return lambda images: [seen.append(images.shape), denoiser.unet.conv_in.weight.square().sum()][1]

    plain = trained(None)
    assert torch.equal(trained(lambda denoiser: lambda images: torch.zeros(())), plain)
    assert not torch.equal(trained(term), plain)
    assert (8, 3, 8, 8) in seen


def test_smoothed_labels_leave_less_certain_predictions():
    images, labels = squares()

    def certainty(smoothing):
        settings = ClassifierTraining(width=4, epochs=60, batch_size=10, label_smoothing=smoothing)
        classifier = train_classifier(images, labels, 2, settings, 0, lambda *_: None)
        return float(classifier(images.float() / 255).softmax(dim=1).amax(dim=1).mean())

    assert certainty(0.4) == pytest.approx(0.8, abs=0.05)
    assert certainty(0.0) > 0.95


def test_moves_are_by_whole_pixels_and_mirroring_is_of_half():
    images = torch.rand(300, 3, 6, 6)
    moved = augment(images, Augmentation(crop=2), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = torch.stack([padded[:, :, y : y + 6, x : x + 6] for y in range(5) for x in range(5)])
    hits = (windows == moved).all(dim=(2, 3, 4))
    assert (hits.sum(dim=0) == 1).all()
    assert (hits.sum(dim=1) > 0).all()
    mirrored = augment(images, Augmentation(flip=True), torch.Generator().manual_seed(0))
    flipped = (mirrored == images.flip(-1)).all(dim=(1, 2, 3))
    assert ((mirrored == images).all(dim=(1, 2, 3)) ^ flipped).all()
    assert 100 < flipped.sum() < 200


def test_a_vision_transformer_is_trained_stored_and_has_gradcam_maps(tmp_path):
    images, labels = squares()
    settings = ClassifierTraining(patch=2, width=16, depth=2, heads=2, epochs=30, batch_size=10, learning_rate=3e-3)
    trained = train_classifier(images, labels, 2, settings, 0, lambda step: None)
    floats = images.float() / 255
    assert (trained(floats).argmax(dim=1) == labels).all()
    save_classifier(trained, tmp_path / "model.safetensors")
    loaded = load_classifier(tmp_path / "model.safetensors")
    assert torch.equal(loaded(floats), trained(floats))
    assert torch.allclose(loaded.head(loaded.features(floats)), loaded(floats))
    assert cam_maps(loaded, floats[:3], labels[:3]).shape == (3, 8, 8)
    assert loaded.input_size == 8


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"depth": 2}, "depth: it is of a vision transformer; give patch too"),
        ({"patch": 2, "blocks": [1]}, "residual blocks or is a vision transformer, not both"),
        ({"stages": [8], "blocks": [1]}, "stages, blocks: they are of different networks"),
        ({"patch": 2, "width": 10}, "width: 10 is not a multiple of heads, 4"),
    ],
)
def test_settings_of_two_networks_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        parse_settings(ClassifierTraining, settings, "benchmark")


def test_settings_of_a_convolutional_classifier_name_models_as_before():
    assert (
        not {"patch", "depth", "heads", "stages", "label_smoothing"} & ClassifierTraining(width=8).model_dump().keys()
    )
    assert {"patch", "depth", "heads"} <= ClassifierTraining(patch=2).model_dump().keys()
    with pytest.raises(SettingError, match="patch: 3 does not divide"):
        untrained_classifier((1, 8, 8), 2, ClassifierTraining(patch=3))
    with pytest.raises(SettingError, match=r"stages: images of \[8, 8\] cannot be halved 3 times"):
        untrained_classifier((1, 8, 8), 2, ClassifierTraining(stages=(8, 8, 8)))
    untrained_classifier((1, 9, 9), 2, ClassifierTraining(stages=(8, 8, 8)))(torch.rand(2, 1, 9, 9))
