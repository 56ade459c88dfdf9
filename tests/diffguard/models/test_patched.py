"""A denoiser on patches: the same as a network on folded pixels, under every guidance, saved, bundled and scored."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from diffguard.cli.main import main
from diffguard.detectors.diffguard import DiffGuard
from diffguard.engine import Request, score_batch
from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.models.denoisers.patched import PatchedDenoiser, patch_of
from diffguard.settings import AdaptiveStop, AllLabels, ClassifierGuidance, LabelGuidance, NoGuidance, Variant

PATCH, SIDE = 2, 16


def unet(channels=12, out=None, labels=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=SIDE // PATCH,
            in_channels=channels,
            out_channels=out or channels,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=labels,
            resnet_time_scale_shift="scale_shift",
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of Diffusers' own, which nothing here has made or trained."""
    path = tmp_path_factory.mktemp("patched") / "denoiser"
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet(), scheduler).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def denoiser(folder):
    return load_denoiser(folder)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ConvClassifier(4, width=4, in_channels=3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def test_it_is_told_by_its_channels(denoiser):
    assert isinstance(denoiser, PatchedDenoiser)
    assert (denoiser.patch, denoiser.image_shape, denoiser.num_labels) == (PATCH, (3, SIDE, SIDE), 4)


def test_noise_is_that_of_the_network_on_folded_pixels(denoiser, images):
    x, timestep, label = denoiser.encode(images), torch.tensor([0, 5, 400, 800, 999]), torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad():
        found = denoiser.eps(x, timestep, label)
        folded = x.view(5, 3, SIDE // 2, 2, SIDE // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(5, 12, SIDE // 2, SIDE // 2)
        v = denoiser.unet(folded, timestep, class_labels=label).sample
    v = v.view(5, 3, 2, 2, SIDE // 2, SIDE // 2).permute(0, 1, 4, 2, 5, 3).reshape(5, 3, SIDE, SIDE)
    a = denoiser.alphas_cumprod.float()[timestep].view(-1, 1, 1, 1)
    assert torch.allclose(found, a.sqrt() * v + (1 - a).sqrt() * x, atol=1e-5)


def test_of_a_learned_variance_the_noise_counts(images):
    twice = PatchedDenoiser(unet(out=24), DDIMScheduler(), PATCH)
    x, at = twice.encode(images[:2]), torch.tensor([3, 700])
    with torch.no_grad():
        found = twice.eps(x, at, torch.tensor([0, 1]))
        whole = twice.unet(F.pixel_unshuffle(x, PATCH), at, class_labels=torch.tensor([0, 1])).sample
    assert torch.equal(found, F.pixel_shuffle(whole[:, :12], PATCH))


VARIANTS = {
    "label": Variant(stop=3, guidance=LabelGuidance(scale=2), distance="l1"),
    "masked": Variant(stop=3, guidance=LabelGuidance(scale=2, cam_cut=0.3), distance="l1"),
    "all labels": Variant(stop=2, guidance=AllLabels(), distance="l1"),
    "none": Variant(stop=3, guidance=NoGuidance(), distance="ssim"),
    "classifier": Variant(
        stop=3, guidance=ClassifierGuidance(cutouts=2, cutout_size=8), distance="logits", against="unconditional"
    ),
    "early stop": Variant(
        stop=AdaptiveStop(min_level=1, max_level=4, thresholds={"psnr": 55.0}),
        guidance=LabelGuidance(),
        distance="features",
    ),
    "resized": Variant(stop=2, guidance=LabelGuidance(), distance="l1", process_method="resize"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_guidance_scores_alike_in_any_batch(name, denoiser, classifier, images):
    given = F.interpolate(images, size=12) if name == "resized" else images
    [together] = score_batch(given, denoiser, [Request(classifier, VARIANTS[name])])
    assert together.score.isfinite().all()
    assert together.score.std() > 0
    alone = [score_batch(image[None], denoiser, [Request(classifier, VARIANTS[name])])[0].score for image in given]
    assert torch.allclose(torch.cat(alone), together.score, rtol=1e-3, atol=1e-5)


def test_saved_it_comes_back(denoiser, images, tmp_path):
    save_denoiser(denoiser, tmp_path / "d")
    loaded = load_denoiser(tmp_path / "d")
    at, label = torch.tensor([400]), torch.tensor([1])
    assert torch.equal(loaded.eps(images[:1], at, label), denoiser.eps(images[:1], at, label))
    gray = PatchedDenoiser(unet(channels=4), DDIMScheduler(), 2)
    save_denoiser(gray, tmp_path / "gray")
    assert load_denoiser(tmp_path / "gray").image_shape == (1, SIDE, SIDE)


def test_what_the_channels_leave_open_is_said(tmp_path):
    DDPMPipeline(unet(channels=4), DDIMScheduler()).save_pretrained(tmp_path / "d")
    with pytest.raises(SettingError, match=r"4 channels are of gray images in patches of 2x2 pixels, or of"):
        load_denoiser(tmp_path / "d")
    assert load_denoiser(tmp_path / "d", patch=2).image_shape == (1, SIDE, SIDE)
    assert load_denoiser(tmp_path / "d", patch=1).image_shape == (4, SIDE // 2, SIDE // 2)
    with pytest.raises(SettingError, match="patch: 4 channels are not of patches of 3x3 pixels"):
        load_denoiser(tmp_path / "d", patch=3)
    assert [patch_of(each, "x") for each in (1, 2, 3, 5, 6, 9, 12, 27, 48, 64, 192)] == [
        1,
        1,
        1,
        1,
        1,
        3,
        2,
        3,
        4,
        8,
        8,
    ]


def test_the_command_scores_it(folder, classifier, denoiser, images, tmp_path, capsys):
    Image.fromarray((images[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    save_classifier(classifier, tmp_path / "c.safetensors")
    pair = ["--classifier", str(tmp_path / "c.safetensors"), "--denoiser", str(folder)]
    with pytest.raises(SystemExit) as end:
        main(["score", str(tmp_path / "a.png"), *pair])
    assert end.value.code == 0
    expected = DiffGuard(classifier, denoiser).predict((images[:1] * 255).byte().float() / 255)
    assert f"score {float(expected):.5g}" in capsys.readouterr().out


def test_a_patch_that_is_damaged_is_named(denoiser, tmp_path):
    save_denoiser(denoiser, tmp_path / "d")
    (tmp_path / "d" / "patch.json").write_text(json.dumps({"patch": 5}))
    with pytest.raises(SettingError, match="12 channels are not of patches of 5x5 pixels"):
        load_denoiser(tmp_path / "d")
    (tmp_path / "d" / "patch.json").write_text("?")
    with pytest.raises(DataError, match="the denoiser cannot be loaded"):
        load_denoiser(tmp_path / "d")
