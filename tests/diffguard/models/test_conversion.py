"""Checkpoints: tiny ones in the published files' layout, and the published ones' shapes at full size."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from published_keys import filled, latent_keys, published_adm, published_ldm, unet_keys, vq_keys

from diffguard.cli.main import main
from diffguard.errors import DataError
from diffguard.models.conversion import (
    PUBLISHED_LATENT,
    PUBLISHED_PIXEL,
    UNetShape,
    convert,
    from_checkpoint,
    latent_denoiser,
    pixel_denoiser,
)
from diffguard.models.denoisers.loading import load_denoiser
from diffguard.models.weights import read_weights

ATTENTION = (False, False, True)


@pytest.fixture(scope="module")
def adm():
    return filled(unet_keys(32, (1, 1, 2), 2, ATTENTION, 3, 6, adm=True))


@pytest.fixture(scope="module")
def ldm():
    unet = unet_keys(32, (1, 1, 2), 1, (False, True, True), 3, 3, adm=False, context=48)
    return filled(latent_keys(unet, vq_keys(32, (1, 1, 2), 1, 3, 64), 11, 48))


def lightning_file(path, state):
    """What Lightning writes: the state dict beside counters, and a callback's state under its class."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module.__name__]
    sys.modules |= {name: module for name in names}
    try:
        callbacks = {ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1)}}
        torch.save({"epoch": 1, "global_step": 2, "callbacks": callbacks, "state_dict": state}, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path


def test_the_published_pixel_model_maps_whole():
    state = published_adm()
    assert len(state) == 566
    assert sum(each.numel() for each in state.values()) == 552_814_086
    assert UNetShape.of(state) == PUBLISHED_PIXEL
    unet = pixel_denoiser(state, "published", 256, 64).unet
    assert sum(each.numel() for each in unet.parameters()) == 552_814_086
    # The trap: with scale-shift Diffusers leaves this norm out unless it is asked for.
    assert unet.mid_block.attentions[0].group_norm is not None


def test_the_published_latent_model_maps_whole():
    state = published_ldm()
    prefix = "model.diffusion_model."
    unet = {key.removeprefix(prefix): each for key, each in state.items() if key.startswith(prefix)}
    assert UNetShape.of(unet) == PUBLISHED_LATENT
    denoiser = latent_denoiser(state, "published", 256, 1)
    assert round(sum(each.numel() for each in denoiser.unet.parameters()) / 1e5) == 4009
    assert (denoiser.num_labels, denoiser.null_label, denoiser.image_shape) == (1000, 1000, (3, 256, 256))
    assert denoiser.unet.config.sample_size == 64


def test_a_converted_pixel_model_computes_the_same_from_its_folder(adm, tmp_path):
    torch.save(adm, tmp_path / "uncond.pt")
    made = convert(tmp_path / "uncond.pt", tmp_path / "adm", image_size=32, head_channels=16)
    loaded = load_denoiser(tmp_path / "adm")
    assert (loaded.num_labels, loaded.null_label, loaded.image_shape) == (0, None, (3, 32, 32))
    x, timestep = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 800])
    with torch.no_grad():
        noise = made.eps(x, timestep, timestep)
        assert noise.shape == x.shape
        assert torch.equal(loaded.eps(x, timestep, timestep), noise)
        theirs = UNet2DModel.from_pretrained(tmp_path / "adm" / "unet", low_cpu_mem_usage=False)
        assert torch.equal(theirs(x, timestep).sample[:, :3], noise)
    assert torch.equal(loaded.alphas_cumprod, made.alphas_cumprod)


def test_a_converted_latent_model_computes_the_same_from_its_folder(ldm, tmp_path):
    path = lightning_file(tmp_path / "model.ckpt", ldm)
    made = convert(path, tmp_path / "ldm", image_size=64, heads=1)
    loaded = load_denoiser(tmp_path / "ldm")
    assert (loaded.num_labels, loaded.null_label, loaded.image_shape) == (10, 10, (3, 64, 64))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    timestep, label = torch.tensor([1, 900]), torch.tensor([3, 10])
    with torch.no_grad():
        latents = made.encode(images)
        assert latents.shape == (2, 3, 16, 16)
        assert torch.equal(loaded.encode(images), latents)
        assert torch.equal(loaded.eps(latents, timestep, label), made.eps(latents, timestep, label))
        assert torch.equal(loaded.decode(latents), made.decode(latents))
    UNet2DConditionModel.from_pretrained(tmp_path / "ldm" / "unet", low_cpu_mem_usage=False)
    VQModel.from_pretrained(tmp_path / "ldm" / "vqvae", low_cpu_mem_usage=False)


def test_diffusers_own_pipeline_samples_from_a_converted_pixel_model(adm, tmp_path):
    torch.save(adm, tmp_path / "uncond.pt")
    made = convert(tmp_path / "uncond.pt", tmp_path / "adm", image_size=32, head_channels=16)
    pipeline = DDPMPipeline(made.unet, made.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_the_command_converts_and_says_what_it_was(adm, tmp_path):
    torch.save(adm, tmp_path / "uncond.pt")
    options = ["--image-size", "32", "--head-channels", "16"]
    command = [
        sys.executable,
        "-m",
        "diffguard.cli.main",
        "convert",
        str(tmp_path / "uncond.pt"),
        str(tmp_path / "adm"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    count = sum(each.numel() for each in adm.values())
    assert f"PixelDenoiser, UNet of {count:,} parameters, no labels" in done.stdout
    again = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].endswith("adm: exists already; name a new folder")


def without(state, key):
    return {name: each for name, each in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "input_blocks.7.0.skip_connection.weight"),
            "1 of 300 are missing: down_blocks.2",
        ),
        (
            lambda s: without(s, "middle_block.1.qkv.weight"),
            "3 of 300 are missing: mid_block",
        ),
        (lambda s: {**s, "label_emb.weight": torch.zeros(10, 128)}, "1 are not of this network: label_emb.weight"),
        (lambda s: {**s, "out.0.weight": torch.zeros(7)}, "1 have another shape: conv_norm_out.weight 7 for 32"),
        (lambda s: without(s, "out.2.weight"), r"not whole \('out.2.weight' is missing\)"),
        (lambda s: without(s, "input_blocks.0.0.weight"), "neither guided-diffusion's layout"),
        (lambda s: {**s, "step": 3}, "holds no state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_which_keys(change, message, adm, tmp_path):
    torch.save(change(adm), tmp_path / "bad.pt")
    with pytest.raises(DataError, match=message) as error:
        convert(tmp_path / "bad.pt", tmp_path / "out", image_size=32, head_channels=16)
    assert "bad.pt" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_head_channels_are_named(adm, tmp_path):
    torch.save(adm, tmp_path / "uncond.pt")
    with pytest.raises(DataError, match="head_channels: 48"):
        from_checkpoint(tmp_path / "uncond.pt", image_size=32, head_channels=48)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code ran')",))


def test_code_pickled_in_a_checkpoint_is_not_run(adm, tmp_path):
    torch.save({"state_dict": adm, "hyper_parameters": Harmful()}, tmp_path / "harmful.ckpt")
    with pytest.raises(DataError, match=r"harmful\.ckpt: .*\(it holds a exec, and only weights"):
        read_weights(tmp_path / "harmful.ckpt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("options", "steps", "betas"),
    [
        ([], 1000, lambda: torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        (["--schedule", "linear", "--steps", "500"], 500, lambda: torch.linspace(2e-4, 0.04, 500, dtype=torch.float64)),
        (["--beta-end", "0.01"], 1000, lambda: torch.linspace(1e-4, 0.01, 1000, dtype=torch.float64)),
        (["--schedule", "cosine", "--steps", "400"], 400, None),
    ],
)
def test_the_schedule_is_said_and_can_be_another(options, steps, betas, adm, tmp_path, capsys):
    torch.save({f"module.{key}": value for key, value in adm.items()}, tmp_path / "uncond.pt")
    size = ["--image-size", "32", "--head-channels", "16"]
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "uncond.pt"), str(tmp_path / "adm"), *size, *options])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"training: {steps} steps, " in printed
    assert ("give --schedule and --steps" in printed) == ("--schedule" not in options)
    alphas = load_denoiser(tmp_path / "adm").alphas_cumprod
    if betas is not None:
        assert torch.allclose(alphas, (1 - betas()).cumprod(0), rtol=1e-6)
    else:  # arXiv 2102.09672, equation 17
        at = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * torch.pi / 2
        expected = at.cos() ** 2 / at[0].cos() ** 2
        assert torch.allclose(alphas[: steps - 5], expected[1 : steps - 4], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head-channels", "0"], "head_channels: 0 is not at least 1"),
        (["--head-channels", "-4"], "head_channels: -4 is not at least 1"),
        (["--image-size", "0"], "image_size: 0 is not at least 1"),
        (["--heads", "0"], "heads: 0 is not at least 1"),
        (["--schedule", "quadratic"], "schedule: 'quadratic' is not one of linear, cosine, scaled-linear"),
        (["--steps", "1"], "steps: 1 is not at least 2"),
        (["--beta-end", "2"], "beta_end: 2 is not between 0 and 1"),
    ],
)
def test_a_wrong_option_is_one_line(options, message, adm, tmp_path):
    torch.save(adm, tmp_path / "uncond.pt")
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(["convert", str(tmp_path / "uncond.pt"), str(tmp_path / "adm"), *options])
    assert not (tmp_path / "adm").exists()
