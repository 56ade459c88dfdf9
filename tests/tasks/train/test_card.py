"""What a trained denoiser's folder says of it, in float16 too, and who carries that on."""

import pytest
import torch
import yaml
from own_project import own_benchmark, save_own, write_own
from safetensors import safe_open
from small_detector import Made, tiny_classifier, tiny_denoiser

from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.errors import SettingError
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.models.folder import hash_model, hash_weights
from diffguard.settings import TrainedDenoiser
from diffguard.training import train_denoiser
from tasks.config.run import open_run
from tasks.prepare.stage import prepare_if_changed
from tasks.train.stage import train


@pytest.fixture
def mine(tmp_path, monkeypatch):
    save_own(tmp_path / "own")

    def write(**settings):
        benchmark = own_benchmark()
        small = {"channels": [8, 16], "norm_groups": 4, "iterations": 3, "batch_size": 4}
        benchmark["ind"]["animals"]["splits"]["validation"] = 4
        benchmark["denoiser"] = {"kind": "trained", **small, **settings}
        write_own(monkeypatch, tmp_path, benchmark)
        run = open_run(benchmark="mine", root=str(tmp_path / "own"))
        prepare_if_changed(run.benchmark, run.home, seed=0)
        return run

    return write


def types(folder):
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def split(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_card_says_what_it_was_trained_on(mine):
    run = mine()
    folder = train(run, "denoiser", 0)
    head, text = split((folder / "README.md").read_text())
    assert head["library_name"] == "diffusers"
    assert "license" not in head
    assert "accuracy as a classifier" in text
    count = (run.manifest["split"] == "train").sum()
    for said in (
        f"# Denoiser of `{run.benchmark.name}`",
        f"{count:,} images, split train",
        ", ".join(run.classes),
        f"Seed 0, 3 steps, 12 images ({12 / count:.1f} epochs), from random weights.",
        "channels: [8, 16]",
        "label_drop: 0.15",
        "in float32",
        "None is given",
    ):
        assert said in text
    assert types(folder) == {"F32"}


def test_in_float16_it_takes_half_the_space_and_is_what_is_loaded(mine):
    whole = train(mine(), "denoiser", 0)
    run = mine(stored="float16", license="cc-by-4.0")
    folder = train(run, "denoiser", 0)
    assert types(folder) == {"F16"}
    head, text = split((folder / "README.md").read_text())
    assert head["license"] == "cc-by-4.0"
    assert "in float16" in text
    opened, first = load_denoiser(folder), load_denoiser(whole)
    for name, value in opened.unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, first.unet.state_dict()[name].half().float())


@pytest.mark.parametrize(
    ("license", "on_hub"), [("apache-2.0", "apache-2.0"), ("CC-BY-4.0", "other"), ("as its images allow", "other")]
)
def test_a_license_that_the_hub_does_not_know_is_in_words(mine, license, on_hub):
    run = mine(license=license, patch=2, augmentation={"flip": True})
    head, text = split((train(run, "denoiser", 0) / "README.md").read_text())
    assert head["license"] == on_hub
    assert text.endswith(f"## License\n{license}\n")
    assert "on patches of 2×2 pixels" in text
    settings = yaml.safe_load(text.split("```")[1].removeprefix("yaml"))
    assert TrainedDenoiser(kind="trained", license=license, **settings) == run.benchmark.denoiser


def test_neither_license_nor_card_makes_it_another_model(mine):
    run = mine()
    folder = train(run, "denoiser", 0)
    assert mine(license="mit").model(0, "denoiser") == folder
    assert mine(stored="float16").model(0, "denoiser") != folder
    hashed = hash_model(folder)
    (folder / "README.md").write_text("other words")
    assert hash_model(folder) == hashed
    (folder / "unet" / "README.md").write_text("not the card")
    assert hash_model(folder) != hashed


def test_weights_that_float16_does_not_hold_end_in_one_line_and_are_kept(mine, monkeypatch):
    def train_large(*arguments, **options):
        denoiser = train_denoiser(*arguments, **options)
        next(denoiser.unet.parameters()).view(-1)[0] = 1e6
        return denoiser

    monkeypatch.setattr("tasks.train.stage.train_denoiser", train_large)
    run = mine(stored="float16")
    with pytest.raises(SettingError, match="stored: float16 does not hold its weights"):
        train(run, "denoiser", 0)
    run = mine()
    monkeypatch.setattr("diffguard.training.loop.Trainer._step", lambda self: pytest.fail("it is trained already"))
    folder = train(run, "denoiser", 0)
    assert "3 steps" in (folder / "README.md").read_text()


def test_figures_of_validation_and_the_weights_that_it_began_with(mine, monkeypatch, tmp_path):
    first = train(mine(), "denoiser", 0)
    hashed = hash_weights(load_denoiser(first))
    measured = {"validation/accuracy_as_classifier": 0.25, "validation/near_auroc/label-gain": 0.7}
    monkeypatch.setattr("tasks.train.meter.Meter.measure", lambda *_, **__: measured)
    folder = train(mine(iterations=2), "denoiser", 0, start=str(first))
    text = (folder / "README.md").read_text()
    assert "| accuracy as a classifier | 25.0 |" in text
    assert "2 steps, 8 images" in text
    assert str(tmp_path) not in text
    assert f"from the weights with the hash {hashed}." in text
    assert "| near AUROC of `label-gain` | 70.0 |" in text


def test_a_card_and_float16_go_along_where_a_denoiser_is_saved(tmp_path):
    denoiser = tiny_denoiser()
    denoiser.unet.half().float()
    denoiser.card = "what it is\n"
    save_denoiser(denoiser, tmp_path / "one")
    detector = Made(tiny_classifier(), load_denoiser(tmp_path / "one")).detector("gated")
    save_bundle(detector, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "denoiser" / "README.md").read_text() == "what it is\n"
    assert types(tmp_path / "bundle" / "denoiser") == {"F16"}
    opened = load_bundle(tmp_path / "bundle").denoiser
    assert hash_weights(opened) == hash_weights(denoiser)
    with torch.no_grad():  # one weight that float16 does not hold
        next(denoiser.unet.parameters()).view(-1)[0] = 1 / 3
    save_denoiser(denoiser, tmp_path / "two")
    assert types(tmp_path / "two") == {"F32"}


def test_a_card_that_is_a_link_is_not_read(tmp_path):
    save_denoiser(tiny_denoiser(), tmp_path / "one")
    (tmp_path / "secret").write_text("of this machine")
    (tmp_path / "one" / "README.md").symlink_to(tmp_path / "secret")
    assert load_denoiser(tmp_path / "one").card is None


@pytest.mark.parametrize("content", [b"\xff\xfe\x00 no text", b"a" * (2**20 + 1)])
def test_a_card_that_is_no_page_of_text_is_left_behind(tmp_path, content):
    save_denoiser(tiny_denoiser(), tmp_path / "one")
    (tmp_path / "one" / "README.md").write_bytes(content)
    assert load_denoiser(tmp_path / "one").card is None
