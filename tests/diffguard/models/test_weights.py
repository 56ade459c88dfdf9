"""Weights in files of every format: opened whole and right, or one line that says what does not fit."""

import argparse
import json
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from tiny_models import save_conditional, save_dit, save_latent, save_stable_diffusion, save_unconditional
from torch import nn

from diffguard.detectors.diffguard import DiffGuard
from diffguard.errors import DataError, DiffGuardError
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.classifiers.loading import open_classifier
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.loading import load_denoiser, open_denoiser
from diffguard.models.weights import read_weights
from diffguard.settings import LabelGuidance, LibraryClassifier, ObjectClassifier, PretrainedDenoiser, Variant

WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(folder):
    return open_denoiser(PretrainedDenoiser(kind="pretrained", path=str(folder)), ["ant", "bee", "cat", "dog"])


def noise(denoiser):
    x = denoiser.encode(torch.rand(2, *denoiser.image_shape, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        return denoiser.eps(x, torch.tensor([3, 700]), torch.tensor([0, 1]))


PARTS = {
    "unet": (save_conditional, "unet"),
    "in the folder itself": (save_unconditional, ""),
    "transformer": (save_dit, "transformer"),
    "vae": (save_dit, "vae"),
    "conditional unet": (save_latent, "unet"),
    "vqvae": (save_latent, "vqvae"),
}


def rewritten(path, change):
    save_file(change(load_file(path)), path)


def prefixed(*prefixes):
    return lambda state: {"".join(prefixes) + key: value for key, value in state.items()}


def inner(state):
    """As torch.compile leaves it of parts of a network."""
    return {key.replace(".", "._orig_mod.", 1): value for key, value in state.items()}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "change", [prefixed("_orig_mod."), prefixed("module.", "_orig_mod."), prefixed("model."), inner]
)
def test_what_a_wrapper_left_before_names_is_taken_off(part, change, tmp_path):
    save, folder = PARTS[part]
    (tmp_path / "d").mkdir() if save is save_unconditional else None
    save(tmp_path / "d")
    clean = noise(opened(tmp_path / "d"))
    rewritten(tmp_path / "d" / folder / WEIGHTS, change)
    assert torch.equal(noise(opened(tmp_path / "d")), clean)


def broken(state):
    """NaN in one tensor."""
    name = sorted(key for key, value in state.items() if value.is_floating_point())[0]
    value = state[name].clone()
    value.view(-1)[0] = float("nan")
    return {**state, name: value}


def other_shape(state):
    name = sorted(state)[0]
    return {**state, name: torch.zeros(3, 2)}


WRONG = {
    "three are missing": (lambda s: dict(sorted(s.items())[3:]), r"3 of \d+ are missing: [\w.]+, [\w.]+, [\w.]+$"),
    "one more": (lambda s: {**s, "more.weight": torch.ones(2)}, "1 are not of this network: more.weight$"),
    "renamed": (prefixed("net."), r"(\d+) of \1 are missing: .*, …; \1 are not of this network: net\."),
    "half of them renamed": (
        lambda s: {("net." if i % 2 else "") + key: value for i, (key, value) in enumerate(s.items())},
        r"are missing: .*; \d+ are not of this network: net\.",
    ),
    "another shape": (other_shape, r"1 have another shape: [\w.]+ 3x2 for \d+"),
    "whole numbers": (
        lambda s: {key: value.to(torch.int8) for key, value in s.items()},
        r"\d+ are whole numbers: [\w.]+ \(torch.int8\)",
    ),
    "all zero": (lambda s: {key: torch.zeros_like(value) for key, value in s.items()}, "all of its weights are zero"),
    "not finite": (broken, r"[\w.]+ holds numbers that are not finite"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", WRONG)
def test_weights_that_do_not_fit_are_one_line(part, what, tmp_path):
    save, folder = PARTS[part]
    change, message = WRONG[what]
    (tmp_path / "d").mkdir() if save is save_unconditional else None
    save(tmp_path / "d")
    path = tmp_path / "d" / folder / WEIGHTS
    rewritten(path, change)
    with pytest.raises(DataError, match=message) as error:
        opened(tmp_path / "d")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["pickled", "half precision", "in parts"])
def test_every_way_to_store_them_is_the_same_network(what, tmp_path):
    save_conditional(tmp_path / "d")
    folder, clean = tmp_path / "d" / "unet", noise(opened(tmp_path / "d"))
    state = load_file(folder / WEIGHTS)
    if what == "half precision":
        save_file({key: value.half() for key, value in state.items()}, folder / WEIGHTS)
        found = noise(opened(tmp_path / "d"))
        assert found.dtype == torch.float32
        assert 0 < (found - clean).abs().max() < 1e-2
        return
    (folder / WEIGHTS).unlink()
    if what == "pickled":
        torch.save(OrderedDict(prefixed("module.")(state)), folder / "diffusion_pytorch_model.bin")
    else:
        UNet2DModel.from_config(UNet2DModel.load_config(folder)).save_pretrained(folder, max_shard_size="20KB")
        index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 1
        for name in set(index.values()):
            save_file({key: state[key] for key, file in index.items() if file == name}, folder / name)
    assert torch.equal(noise(opened(tmp_path / "d")), clean)


def test_attention_under_its_old_names(tmp_path):
    """As google/ddpm-cifar10-32 has it."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(state):
        made = {}
        for key, value in state.items():
            for new, name in old.items():
                key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
            made[key] = value
        return made

    save_conditional(tmp_path / "d")
    clean = noise(opened(tmp_path / "d"))
    rewritten(tmp_path / "d" / "unet" / WEIGHTS, renamed)
    assert any(".query." in key for key in load_file(tmp_path / "d" / "unet" / WEIGHTS))
    assert torch.equal(noise(opened(tmp_path / "d")), clean)


@pytest.mark.parametrize(
    ("save", "part", "name"),
    [
        (save_conditional, "unet", "UNet2DConditionModel"),
        (save_latent, "unet", "UNet2DModel"),
        (save_latent, "vqvae", "AutoencoderKL"),
        (save_dit, "transformer", "PixArtTransformer2DModel"),
        (save_dit, "vae", "AutoencoderTiny"),
    ],
)
def test_another_network_than_the_family_is_written_for_is_named(save, part, name, tmp_path):
    save(tmp_path / "d")
    path = tmp_path / "d" / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))
    with pytest.raises(DataError, match=f"{part}: a {name}, where a denoiser of this kind has a "):
        opened(tmp_path / "d")


@pytest.mark.parametrize(
    ("save", "missing", "message"),
    [
        (save_stable_diffusion, "vae", "unet: a UNet2DConditionModel, where a denoiser of this kind has a UNet2DModel"),
        (save_dit, "transformer", "unet/config.json: no such file; a part of the denoiser is missing"),
    ],
)
def test_a_folder_without_one_of_its_parts_is_named(save, missing, message, tmp_path):
    save(tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / missing)
    with pytest.raises(DataError, match=message):
        load_denoiser(tmp_path / "d")


@pytest.mark.parametrize(
    ("file", "tensor", "value", "message"),
    [
        ("class_embedder", "weight", torch.full((5, 8), torch.inf), "weight holds numbers that are not finite"),
        ("class_embedder", "weight", torch.zeros(5, 7), r"weight has the shape \(5, 7\) in place of \(any, 8\)"),
        ("class_embedder", "embedding", torch.zeros(5, 8), "it has no tensor 'weight', but embedding"),
    ],
)
def test_embeddings_that_do_not_fit_are_named(file, tensor, value, message, tmp_path):
    save_latent(tmp_path / "d")
    save_file({tensor: value}, tmp_path / "d" / file / "model.safetensors")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "d")


def test_a_text_encoder_that_lacks_weights_is_named(tmp_path):
    save_stable_diffusion(tmp_path / "d")
    path = tmp_path / "d" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file(dict(sorted(state.items())[1:]), path, {"format": "pt"})
    with pytest.raises(DataError, match=r"text_encoder: the weights do not fit CLIPTextModel: 1 missing keys: "):
        opened(tmp_path / "d")
    save_file(broken(state), path, {"format": "pt"})
    with pytest.raises(DataError, match=r"text_encoder: .* holds numbers that are not finite"):
        opened(tmp_path / "d")


@pytest.mark.parametrize(("labels", "message"), [([0, 9], "9 is not within"), (["a"], "'a' is not within")])
def test_labels_beyond_the_model_are_named(labels, message, tmp_path):
    save_conditional(tmp_path / "d")
    (tmp_path / "d" / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(DiffGuardError, match=rf"labels\.json.*{message}"):
        load_denoiser(tmp_path / "d")


@pytest.mark.parametrize("sides", [[16, 16], 16])
def test_sides_as_a_list(sides, tmp_path):
    save_conditional(tmp_path / "d")
    path = tmp_path / "d" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": sides}))
    assert load_denoiser(tmp_path / "d").image_shape == (3, 16, 16)
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": [16, 8]}))
    with pytest.raises(DataError, match=r"config.json: sample_size: \[16, 8\] is not square"):
        load_denoiser(tmp_path / "d")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Plain().eval()


def checkpoints(state):
    """What timm's CheckpointSaver, torchvision's reference script and others write."""
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    wrapped = {"n_averaged": torch.tensor(7), **{f"module.{key}": value for key, value in averaged.items()}}
    args = argparse.Namespace(lr=0.1, model="resnet18", output=None, device="cuda")
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    return {
        "plain": (state, False),
        "DataParallel": ({f"module.{key}": value for key, value in state.items()}, False),
        "compiled in parallel": ({f"module._orig_mod.{key}": value for key, value in state.items()}, False),
        "Lightning": ({"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3}, False),
        "timm": (
            {
                "epoch": 3,
                "arch": "resnet18",
                "state_dict": state,
                "optimizer": optimizer,
                "version": 2,
                "args": args,
                "metric": np.float64(81.2),
            },
            False,
        ),
        "timm, averaged": ({"state_dict": state, "state_dict_ema": averaged, "args": args}, True),
        "torchvision": ({"model": state, "optimizer": optimizer, "lr_scheduler": {}, "epoch": 1, "args": args}, False),
        "torchvision, averaged": ({"model": state, "model_ema": wrapped, "args": args}, True),
    }


@pytest.mark.parametrize("name", list(checkpoints({})))
def test_a_trainings_checkpoint_is_a_classifier(name, network, tmp_path):
    content, is_averaged = checkpoints(network.state_dict())[name]
    torch.save(content, tmp_path / "c.pth")
    classifier = open_classifier(
        ObjectClassifier(kind="object", object=f"{__name__}:Plain", weights=str(tmp_path / "c.pth")), 16
    )
    found = classifier.network.state_dict()
    added = 1.0 if is_averaged else 0.0
    for key, value in network.state_dict().items():
        assert torch.allclose(found[key].float(), value.float() + (added if value.is_floating_point() else 0))


def test_a_checkpoint_of_a_librarys_network(tmp_path):
    import timm

    made = timm.create_model("test_resnet", num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}}, tmp_path / "c.pth")
    spec = LibraryClassifier(kind="timm", name="test_resnet", weights=str(tmp_path / "c.pth"))
    assert open_classifier(spec, 64).num_classes == 7
    state = made.state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "c.pth")
    assert open_classifier(spec, 64).num_classes == 7
    torch.save({**old, "fc.bias": torch.full((7,), torch.nan)}, tmp_path / "c.pth")
    with pytest.raises(DataError, match=r"c\.pth: fc\.bias holds numbers that are not finite"):
        open_classifier(spec, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; run: git lfs pull"),
        (b"PK\x03\x04 broken", "not a file of weights"),
        (b"", "not a file of weights"),
    ],
)
def test_what_is_no_file_of_weights_is_one_line(content, message, tmp_path):
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            read_weights(tmp_path / name)
        assert "\x1b" not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_saved_classifier_with_a_wrappers_names(classifier, tmp_path):
    path = tmp_path / "c.safetensors"
    save_classifier(classifier, path)
    metadata = {"class": "diffguard.models.classifiers:ConvClassifier", "config": json.dumps(classifier.config)}
    state = load_file(path)
    save_file({f"_orig_mod.{key}": value for key, value in state.items()}, path, metadata)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_classifier(path)(images), classifier(images))
    for change, message in (WRONG["three are missing"], WRONG["not finite"], WRONG["one more"]):
        save_file(change(state), path, metadata)
        with pytest.raises(DataError, match=message):
            load_classifier(path)


SCHEDULERS = {
    "flow matching": (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is of no discrete variance"),
    "a consistency model": (LCMScheduler(), "LCMScheduler is of no discrete variance-preserving diffusion"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_another_diffusion_is_named(name, tmp_path):
    scheduler, message = SCHEDULERS[name]
    save_conditional(tmp_path / "d")
    scheduler.save_pretrained(tmp_path / "d" / "scheduler")
    with pytest.raises(DataError, match=rf"scheduler_config\.json: {message}"):
        load_denoiser(tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler is of no discrete"),
        ({"_class_name": "Mine"}, "Mine is of no discrete"),
        ({"_class_name": None}, "None is of no discrete"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas: the model was trained by flow matching"),
        ({"beta_schedule": "exp"}, "no schedule can be made of it"),
        ({"num_train_timesteps": 0}, "num_train_timesteps: 0 is not within"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas: not a list of 1000 numbers"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"trained_betas": [float("nan")] * 1000}, "its betas are not all numbers between 0 and 1"),
        ({"beta_start": -0.1}, "its betas are not all numbers between 0 and 1"),
        ({"beta_end": 5.0}, "its betas are not all numbers between 0 and 1"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type epsilon"),
    ],
)
def test_a_schedule_that_is_none_of_ours_is_one_line(changes, message, tmp_path):
    save_conditional(tmp_path / "d")
    path = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=message) as error:
        load_denoiser(tmp_path / "d")
    assert "\n" not in str(error.value)


BETAS = np.linspace(1e-4, 0.03, 50).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta_schedule": "scaled_linear"}, lambda: np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2),
        ({"num_train_timesteps": 400}, lambda: np.linspace(1e-4, 0.02, 400)),
        ({"num_train_timesteps": 50, "trained_betas": BETAS}, lambda: np.array(BETAS)),
        (
            {"beta_schedule": "sigmoid"},
            lambda: 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.02 - 1e-4) + 1e-4,
        ),
    ],
)
def test_schedules_are_those_of_their_betas(options, expected, tmp_path):
    save_conditional(tmp_path / "d")
    DDPMScheduler(**options).save_pretrained(tmp_path / "d" / "scheduler")
    alphas = load_denoiser(tmp_path / "d").alphas_cumprod
    assert np.allclose(alphas, np.cumprod(1 - expected()), rtol=1e-4)


def test_a_class_brings_its_own_defaults(tmp_path):
    """A configuration that leaves the betas out means those of its class."""
    save_conditional(tmp_path / "d")
    for scheduler, first in ((HeunDiscreteScheduler(), 0.00085), (EulerDiscreteScheduler(), 0.0001)):
        scheduler.save_pretrained(tmp_path / "d" / "scheduler")
        path = tmp_path / "d" / "scheduler" / "scheduler_config.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("beta_")}
        path.write_text(json.dumps(config))
        assert load_denoiser(tmp_path / "d").alphas_cumprod[0] == pytest.approx(1 - first, abs=1e-7)


def test_how_a_pipeline_would_sample_changes_nothing(tmp_path):
    save_conditional(tmp_path / "d")
    before = load_denoiser(tmp_path / "d").alphas_cumprod
    EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1, use_karras_sigmas=True).save_pretrained(
        tmp_path / "d" / "scheduler"
    )
    assert torch.equal(load_denoiser(tmp_path / "d").alphas_cumprod, before)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_what_a_network_predicts_becomes_noise(prediction, rescaled, tmp_path):
    """The noise stands for the same clean image as Diffusers' own, at the last step of zero terminal SNR too."""
    save_conditional(tmp_path / "d")
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=rescaled, clip_sample=False)
    scheduler.save_pretrained(tmp_path / "d" / "scheduler")
    denoiser = load_denoiser(tmp_path / "d")
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    timestep, label = torch.tensor([0, 500, 999]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        eps = denoiser.eps(x, timestep, label)
        raw = denoiser.unet(x, timestep, class_labels=label).sample
    alpha_bar = denoiser.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    assert (alpha_bar > 0).all()
    x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    plain = scheduler.alphas_cumprod[timestep].double().view(-1, 1, 1, 1)
    expected = raw if prediction == "sample" else plain.sqrt() * x - (1 - plain).sqrt() * raw
    assert torch.allclose(x0[:2], expected[:2].double(), atol=5e-4)
    # With next to no signal float32 holds the clean image to three digits.
    assert torch.allclose(x0[2], expected[2].double(), atol=2e-3 if rescaled else 1e-3)


def test_zero_terminal_snr_from_the_top(tmp_path):
    save_conditional(tmp_path / "d")
    DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(
        tmp_path / "d" / "scheduler"
    )
    detector = DiffGuard(
        ConvClassifier(4, in_channels=3).eval().requires_grad_(False),
        load_denoiser(tmp_path / "d"),
        Variant(stop=10, guidance=LabelGuidance(), distance="l1"),
    )
    assert detector.predict(torch.rand(3, 3, 16, 16)).isfinite().all()
