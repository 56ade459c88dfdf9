"""The trainer: what a denoiser is trained to predict, its optimizers, learning rates, and ends of all kinds."""

import inspect
import math
import os
import signal
import sys
import time
from functools import wraps
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffguard.errors import SettingError
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.models.denoisers.patched import PatchedDenoiser
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import RECIPES, ClassifierTraining, DenoiserTraining, parse_settings
from diffguard.training import loop, optimizers, train_classifier, train_denoiser, untrained_denoiser
from diffguard.training.denoiser import _Objective, draw_timesteps, label_confusion, min_snr_weights, squared_errors
from diffguard.training.optimizers import make_optimizer
from diffguard.training.previews import accuracy_as_classifier
from diffguard.utils.precision import has_bfloat16_units, resolve_precision

TINY = DenoiserTraining(
    channels=(8, 16), norm_groups=4, iterations=30, batch_size=8, checkpoint_minutes=1e-9, precision="float32"
)
PATCHED = TINY.model_copy(
    update={
        "patch": 2,
        "prediction_type": "v_prediction",
        "timesteps": "logit-normal",
        "scale_shift": True,
        "optimizer": "muon",
        "learning_rate": 5e-3,
        "rate_schedule": "warmup-stable-decay",
        "warmup_steps": 5,
    }
)


def squares(side=8):
    """Two classes of RGB images: a bright square in the middle, or none."""
    images = torch.zeros(20, 3, side, side, dtype=torch.uint8)
    images[::2, :, side // 4 : -side // 4, side // 4 : -side // 4] = 255
    return images, torch.arange(20) % 2


def weights(denoiser):
    return torch.cat([each.flatten() for each in denoiser.unet.parameters()])


@pytest.fixture
def steps():
    return []


def test_what_is_predicted_is_turned_into_noise():
    """A network that predicts exactly what training asks of it predicts the noise, whatever it is asked for."""
    images, labels = squares()
    for kind in ("epsilon", "v_prediction"):
        settings = TINY.model_copy(update={"prediction_type": kind, "label_drop": 0.0})
        denoiser = untrained_denoiser((3, 8, 8), 2, settings)
        x0, noise = denoiser.encode(images.float() / 255), torch.randn(20, 3, 8, 8)
        timestep = torch.arange(20) * 49
        alpha_bar = denoiser.alphas_cumprod.float()[timestep].view(-1, 1, 1, 1)
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        target = noise if kind == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
        denoiser.predict = lambda *_, target=target: target
        torch.testing.assert_close(denoiser.eps(x, timestep, labels), noise, atol=1e-4, rtol=1e-4)


def test_min_snr_weighs_the_error_of_x0():
    """Of the same wrong x0 the weighted error is the same, whether noise or v is predicted."""
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.01])
    snr = alpha_bar / (1 - alpha_bar)
    error_of_x0 = torch.full((5,), 0.3)
    error_of_eps = error_of_x0 * snr
    error_of_v = error_of_x0 / (1 - alpha_bar)
    for kind, error in (("epsilon", error_of_eps), ("v_prediction", error_of_v)):
        weights = min_snr_weights(alpha_bar, kind, 5.0)
        torch.testing.assert_close(weights * error, snr.clamp(max=5.0) * error_of_x0)


def confusion(denoiser, images, labels):
    """The mean cross-entropy of the labels against the other one, at a middling noise level."""
    x0, noise = denoiser.encode(images.float() / 255), torch.randn(images.shape, generator=torch.manual_seed(0))
    alpha_bar = float(denoiser.alphas_cumprod[500])
    x, timestep = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise, torch.full((len(x0),), 500)
    with torch.no_grad():
        errors = [squared_errors(denoiser.predict(x, timestep, each), noise) for each in (labels, 1 - labels)]
    return float(label_confusion(*errors).mean())


@pytest.mark.parametrize("patch", [1, 2])
def test_a_term_against_a_wrong_label_tells_labels_apart_sooner(steps, patch):
    images, labels = squares()
    plain = TINY.model_copy(update={"patch": patch, "iterations": 60, "label_drop": 0.2})
    with_term = plain.model_copy(update={"wrong_label": 0.01})
    without, told = (
        confusion(train_denoiser(images, labels, 2, settings, 0, steps.append), images, labels)
        for settings in (plain, with_term)
    )
    assert told < 0.8 * without


def test_a_contrastive_term_leads_away_from_other_images(steps):
    images, labels = squares()

    def norm(settings):
        denoiser = train_denoiser(images, labels, 2, settings, 0, steps.append)
        x, timestep = torch.randn(20, 3, 8, 8, generator=torch.manual_seed(1)), torch.full((20,), 400)
        with torch.no_grad():
            return float(denoiser.predict(x, timestep, labels).square().mean())

    # The best prediction is (target - weight * mean target) / (1 - weight): noise of mean 0 is predicted too large.
    plain = TINY.model_copy(update={"iterations": 200, "label_drop": 0.0})
    assert norm(plain.model_copy(update={"contrastive": 0.3})) > 1.15 * norm(plain)


def test_beside_min_snr_the_contrastive_term_leaves_the_loss_a_lower_bound():
    """Where noise is low, min-SNR weighs an error with less than the term's own weight."""
    images, labels = squares()
    settings = TINY.model_copy(
        update={"min_snr": 5.0, "contrastive": 0.05, "timesteps": "logit-normal", "timestep_mean": -9.0}
    )
    denoiser = untrained_denoiser((3, 8, 8), 2, settings)
    objective = _Objective(denoiser, settings, torch.device("cpu"))
    losses = []
    for size in (1.0, 100.0):
        denoiser.predict = lambda x, *_, size=size: torch.full_like(x, size)
        losses.append(float(objective(images.float() / 255, labels, torch.Generator().manual_seed(0))))
    assert losses[1] > 100 * abs(losses[0])


def test_a_wrong_label_changes_nothing_else_that_is_drawn():
    images, labels = squares()
    drawn = []
    for term in (None, 0.01):
        settings, generator = TINY.model_copy(update={"wrong_label": term}), torch.Generator().manual_seed(0)
        denoiser = untrained_denoiser((3, 8, 8), 2, settings)
        _Objective(denoiser, settings, torch.device("cpu"))(images.float() / 255, labels, generator)
        drawn.append(generator.get_state())
    assert torch.equal(*drawn)


def test_without_terms_settings_are_written_as_ever():
    assert not {"contrastive", "wrong_label"} & TINY.model_dump().keys()
    assert TINY.model_copy(update={"wrong_label": 0.01}).identity()["wrong_label"] == 0.01


def test_timesteps_are_uniform_or_around_the_middle():
    generator = torch.Generator().manual_seed(0)
    uniform = draw_timesteps(20_000, TINY, generator)
    assert (uniform.min(), uniform.max()) == (0, 999)
    assert torch.histc(uniform.float(), 4).min() > 4700
    middle = draw_timesteps(20_000, TINY.model_copy(update={"timesteps": "logit-normal"}), generator)
    assert 490 < middle.float().median() < 510
    # Of a normal number two thirds lie within one deviation, that is sigmoid(±1).
    assert 0.66 < ((middle > 269) & (middle < 731)).float().mean() < 0.70
    wide = TINY.model_copy(update={"timesteps": "logit-normal", "timestep_mean": -2.0, "timestep_std": 9.0})
    shifted = draw_timesteps(20_000, wide, generator)
    assert shifted.float().median() < 200
    assert (shifted.min(), shifted.max()) == (0, 999)


def test_muon_takes_matrices_and_adamw_the_rest():
    network = nn.Sequential(nn.Embedding(3, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    optimizer = make_optimizer("muon", network, 1e-3, 0.01)
    matrices, others = ({id(each) for each in group["params"]} for group in optimizer.param_groups)
    assert matrices == {id(network[1].weight), id(network[3].weight)}
    assert others == {id(each) for each in network.parameters()} - matrices
    before = network[1].weight.detach().clone()
    for weight in network.parameters():  # of full rank, as no gradient of so small a network need be
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # An orthogonal step, scaled to the size of AdamW's: .2 times the root of the longer side in mean square.
    step = (network[1].weight.detach() - before * (1 - 1e-5)).flatten(1)
    singular = torch.linalg.svdvals(step)
    assert singular.max() / singular.min() < 3


@pytest.mark.parametrize(("units", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_computes_in_bfloat16_only_where_it_has_units(units, dtype, monkeypatch):
    from timm.optim import muon

    seen = []
    plain = inspect.unwrap(muon.zeropower_via_newtonschulz)
    noted = wraps(plain)(lambda *args, **options: [seen.append(options["dtype"]), plain(*args, **options)][1])
    del noted.__wrapped__
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", noted)
    monkeypatch.setattr(optimizers, "has_bfloat16_units", lambda device: units)
    layer = nn.Linear(8, 8)
    for _ in range(2):  # the second does not wrap what is wrapped
        optimizer = make_optimizer("muon", layer, 1e-3, 0.0)
        layer(torch.rand(3, 8)).sum().backward()
        optimizer.step()
    assert seen == [dtype] * 2
    assert muon.zeropower_via_newtonschulz.__wrapped__ is noted


@pytest.mark.parametrize("module", [None, SimpleNamespace(Muon=lambda params, lr, adamw_lr: None)])
def test_muon_without_timm_or_of_an_old_one_is_one_line(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim.muon", module)
    with pytest.raises(SettingError, match=r"optimizer: muon is timm's .* pip install 'diffguard-ood\[models\]'"):
        train_denoiser(*squares(), 2, PATCHED, 0, lambda _: None)


def test_the_rate_is_that_of_every_weight():
    """Without a rate nothing moves, whichever optimizer a weight has."""
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer("muon", network, 1e-3, 0.0)
    for rate in (1e-3, 0.0):
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [weight.detach().clone() for weight in network.parameters()]
        network(torch.rand(3, 4)).pow(3).sum().backward()
        optimizer.step()
        moved = [not torch.equal(weight, old) for weight, old in zip(network.parameters(), before, strict=True)]
        assert moved == [rate > 0] * 4


def test_a_patched_denoiser_learns_and_comes_back(tmp_path, steps):
    images, labels = squares(16)
    settings = PATCHED.model_copy(update={"iterations": 150, "min_snr": 5.0})
    denoiser = train_denoiser(images, labels, 2, settings, 0, steps.append)
    assert isinstance(denoiser, PatchedDenoiser)
    assert denoiser.image_shape == (3, 16, 16)
    assert sum(step.loss for step in steps[-10:]) < 0.5 * sum(step.loss for step in steps[:10])
    assert accuracy_as_classifier(denoiser, images.float() / 255, labels) > 0.9
    save_denoiser(denoiser, tmp_path / "made")
    opened = load_denoiser(tmp_path / "made")
    x, timestep = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    assert torch.equal(opened.eps(x, timestep, labels[:3]), denoiser.eps(x, timestep, labels[:3]))
    assert opened.scheduler.config.prediction_type == "v_prediction"


def test_images_that_cannot_be_cut_into_patches_are_named():
    with pytest.raises(SettingError, match="patch: images of 8x8 cannot be cut into patches of side 3"):
        untrained_denoiser((3, 8, 8), 2, TINY.model_copy(update={"patch": 3}))


def test_steps_are_reported(steps):
    train_denoiser(*squares(), 2, PATCHED, 0, steps.append)
    assert [step.step for step in steps] == list(range(1, 31))
    assert {step.steps for step in steps} == {30}
    assert [step.images_seen for step in steps] == [8 * number for number in range(1, 31)]
    assert all(step.gradient_norm > 0 and step.images_per_second > 0 for step in steps)
    rates = [step.learning_rate for step in steps]
    assert rates[:5] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005])
    assert rates[5:25] == pytest.approx([0.005] * 20)
    assert rates[25:] == pytest.approx([0.005 * (1 - math.sqrt(done)) for done in (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)])


def test_a_training_is_extended_and_finished(tmp_path, steps):
    """With more iterations the rate is at its height again; finishing takes it down from wherever it is."""
    path = tmp_path / "c.pt"
    train_denoiser(*squares(), 2, PATCHED, 0, lambda _: None, checkpoint=path)
    longer = PATCHED.model_copy(update={"iterations": 60})
    train_denoiser(*squares(), 2, longer, 0, steps.append, checkpoint=path)
    assert [step.step for step in steps] == list(range(31, 61))
    assert steps[0].learning_rate == steps[17].learning_rate == 0.005
    assert steps[-1].learning_rate < 0.001
    steps.clear()
    endless = PATCHED.model_copy(update={"iterations": 10**6})
    train_denoiser(*squares(), 2, endless, 0, steps.append, checkpoint=path, finish_minutes=0.02)
    rates = [step.learning_rate for step in steps]
    assert steps[0].step == 61
    assert rates == sorted(set(rates), reverse=True)  # from the first step on
    assert rates[0] > 0.003 > 0.001 > rates[-1]


def test_checkpoints_are_half_a_minute_apart_and_further_where_writing_one_takes_long(tmp_path, steps, monkeypatch):
    assert DenoiserTraining().checkpoint_minutes is None
    assert loop.CHECKPOINT_MINUTES == 0.5
    written, write = [], loop.write_checkpoint

    def slowly(path, state):
        written.append(time.monotonic())
        time.sleep(0.05)
        write(path, state)

    monkeypatch.setattr(loop, "write_checkpoint", slowly)
    monkeypatch.setattr(loop, "CHECKPOINT_MINUTES", 1e-9)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 0.2)
    settings = TINY.model_copy(update={"checkpoint_minutes": None, "iterations": 150})
    train_denoiser(*squares(), 2, settings, 0, steps.append, checkpoint=tmp_path / "c.pt")
    assert len(written) > 2  # the last is that of the end
    assert all(later - earlier >= 0.25 for earlier, later in pairwise(written[:-1]))


def test_an_interrupt_is_answered_between_steps(tmp_path, steps):
    images, labels = squares()
    undisturbed = train_denoiser(images, labels, 2, TINY, 0, lambda _: None)
    seldom = TINY.model_copy(update={"checkpoint_minutes": 60})

    def interrupt(step):
        steps.append(step.step)
        if step.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(images, labels, 2, seldom, 0, interrupt, checkpoint=tmp_path / "c.pt")
    assert steps == list(range(1, 8))
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train_denoiser(
        images, labels, 2, seldom, 0, lambda step: steps.append(step.step), checkpoint=tmp_path / "c.pt"
    )
    assert steps == list(range(1, 31))
    assert torch.equal(weights(resumed), weights(undisturbed))
    steps.clear()
    received = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:  # whose handler raises nothing
        with pytest.raises(KeyboardInterrupt):
            train_denoiser(images, labels, 2, seldom, 0, interrupt, checkpoint=tmp_path / "d.pt")
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]
    steps.clear()
    with pytest.raises(KeyboardInterrupt):  # without a checkpoint too
        train_denoiser(images, labels, 2, seldom, 0, interrupt)
    assert steps == list(range(1, 8))


def test_a_classifier_goes_on_where_it_was(tmp_path, steps):
    images, labels = squares()
    settings = ClassifierTraining(width=4, epochs=6, batch_size=10, checkpoint_minutes=1e-9)
    undisturbed = train_classifier(images, labels, 2, settings, 0, lambda _: None)

    def fail(step):
        if step.step == 5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train_classifier(images, labels, 2, settings, 0, fail, checkpoint=tmp_path / "c.pt")
    resumed = train_classifier(images, labels, 2, settings, 0, steps.append, checkpoint=tmp_path / "c.pt")
    assert [step.step for step in steps] == list(range(5, 13))
    for one, other in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_averaged_weights_come_with_the_statistics_of_the_network():
    images, labels = squares()
    settings = ClassifierTraining(width=4, blocks=(1, 1), epochs=30, batch_size=10, ema=0.9)
    classifier = train_classifier(images, labels, 2, settings, 0, lambda _: None)
    plain = train_classifier(images, labels, 2, settings.model_copy(update={"ema": 0.0}), 0, lambda _: None)
    for (name, averaged), (_, last) in zip(classifier.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(averaged, last), name
    assert not torch.equal(next(classifier.parameters()), next(plain.parameters()))
    assert (classifier(images.float() / 255).argmax(dim=1) == labels).all()


def test_a_loss_that_is_not_finite_ends_it_and_harms_no_checkpoint(tmp_path):
    settings = TINY.model_copy(update={"learning_rate": 1e30, "optimizer": "adamw", "precision": "float32"})
    with pytest.raises(SettingError, match=r"learning_rate: 1e\+30 is too high: after \d+ steps the loss is"):
        train_denoiser(*squares(), 2, settings, 0, lambda _: None, checkpoint=tmp_path / "c.pt")
    if (tmp_path / "c.pt").is_file():
        state = torch.load(tmp_path / "c.pt", weights_only=True)
        assert all(bool(value.isfinite().all()) for value in state["network"].values())


def test_it_begins_with_the_weights_of_another(steps):
    images, labels = squares()
    trained = train_denoiser(images, labels, 2, PATCHED.model_copy(update={"iterations": 150}), 0, lambda _: None)
    train_denoiser(images, labels, 2, PATCHED, 0, steps.append, start=trained)
    anew = []
    train_denoiser(images, labels, 2, PATCHED, 0, anew.append)
    assert sum(step.loss for step in steps[:5]) < 0.7 * sum(step.loss for step in anew[:5])
    for other, message in {
        ("channels", (8, 8)): r"start: another network than that of these settings: \d+ tensors differ",
        ("prediction_type", "epsilon"): "start: it predicts v_prediction, and prediction_type is epsilon",
        ("schedule", "linear"): "start: its noise schedule is not schedule: linear with train_steps: 1000",
    }.items():
        settings = PATCHED.model_copy(update=dict([other]))
        with pytest.raises(SettingError, match=message):
            train_denoiser(images, labels, 2, settings, 0, steps.append, start=trained)


def test_bfloat16_trains_as_float32_does():
    """Weights stay in float32, and after some steps the losses are the same to a hundredth."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        found = []
        settings = TINY.model_copy(update={"precision": precision, "iterations": 60})
        denoiser = train_denoiser(*squares(), 2, settings, 0, found.append)
        assert {each.dtype for each in denoiser.unet.parameters()} == {torch.float32}
        losses[precision] = sum(step.loss for step in found[-20:]) / 20
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


def test_auto_is_what_the_device_has_units_for():
    expected = "bfloat16" if has_bfloat16_units("cpu") else "float32"
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("float32", "cpu") == "float32"
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    assert has_bfloat16_units("cpu") == ("amx_bf16" in flags or "avx512_bf16" in flags)


def test_denormals_are_flushed_while_it_trains():
    seen = []
    train_denoiser(*squares(), 2, TINY, 0, lambda _: seen.append(float(torch.tensor(1e-30) * 1e-10)))
    assert set(seen) == {0.0}
    assert float(torch.tensor(1e-30) * 1e-10) > 0


def test_a_denoiser_without_labels_tells_no_classes_apart():
    denoiser = untrained_denoiser((3, 8, 8), 2, TINY)
    denoiser.num_labels = 0
    with pytest.raises(SettingError, match="it takes no labels"):
        accuracy_as_classifier(denoiser, torch.rand(2, 3, 8, 8), torch.zeros(2))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_networks(name):
    denoiser = untrained_denoiser((3, 32, 32), 10, RECIPES[name])
    assert isinstance(denoiser, PatchedDenoiser) == (RECIPES[name].patch > 1)
    assert isinstance(denoiser, PixelDenoiser)
    assert (denoiser.image_shape, denoiser.num_labels) == ((3, 32, 32), 10)
    assert denoiser.unet.config.num_class_embeds == 11
    assert denoiser.eps(torch.randn(2, 3, 32, 32), torch.tensor([3, 900]), torch.tensor([1, 10])).isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_head_dim": 5}, "channels: 64 is not a multiple of attention_head_dim, 5"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"rate_schedule": "cosine"}, "rate_schedule"),
        ({"min_snr": 0}, "min_snr"),
        ({"contrastive": 1.0}, "contrastive"),
        ({"wrong_label": 0}, "wrong_label"),
        ({"decay_fraction": 0}, "decay_fraction"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(DenoiserTraining, values, "x")
