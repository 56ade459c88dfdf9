"""Both published families at a small size with random weights: the rules that digits obey hold for them."""

import pytest
import torch
from published_keys import latent_keys, unet_keys, vq_keys
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from diffguard.detectors.diffguard import DiffGuard
from diffguard.diffusion.guidance import oracle_label
from diffguard.engine import Request, score_batch
from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.wrapped import NetworkClassifier
from diffguard.models.conversion import latent_denoiser, pixel_denoiser
from diffguard.models.denoisers.base import in_precision
from diffguard.models.gradcam import cam_maps, cam_mask
from diffguard.settings import PRESETS, AdaptiveStop, AllLabels, ClassifierGuidance, LabelGuidance, NoGuidance, Variant


def filled(state, seed):
    """Random weights of the size that networks start from."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(each.shape, generator=generator) / max(1, each[0].numel()) ** 0.5
        if each.ndim > 1
        else torch.full(each.shape, float(key.endswith("weight")))
        for key, each in state.items()
    }


@pytest.fixture(scope="module")
def pixel():
    state = unet_keys(32, (1, 2), 1, (False, True), 3, 6, adm=True)
    return pixel_denoiser(filled(state, 0), "made here", 32, 16)


@pytest.fixture(scope="module")
def latent():
    unet = unet_keys(32, (1, 2), 1, (False, True), 3, 3, adm=False, context=16)
    state = filled(latent_keys(unet, vq_keys(32, (1, 1), 1, 3, 32), 11, 16), 1)
    # Random attention hardly sees its labels otherwise.
    state["cond_stage_model.embedding.weight"] *= 30
    return latent_denoiser(state, "made here", 32, 1)


@pytest.fixture(scope="module")
def convolutional():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NetworkClassifier(resnet18(num_classes=10), "layer2")


@pytest.fixture(scope="module")
def transformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VisionTransformer(28, 7, 2, 2, 32, 64, num_classes=10)
        torch.nn.init.normal_(network.heads.head.weight)
    return NetworkClassifier(network, "encoder.layers.encoder_layer_1.ln_1")


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(3))


SMALL = {
    "gdm": PRESETS["gdm-imagenet"].model_copy(
        update={
            "levels": 10,
            "stop": AdaptiveStop(max_level=5, thresholds={"psnr": 54.83, "l1": 0.3}),
            "guidance": ClassifierGuidance(cutout_size=28),
            "distance": "ssim",
            "precision": "float32",
        }
    ),
    "gdm-pad": Variant(
        grid="guided-diffusion",
        levels=10,
        stop=4,
        forback_skip_diff=0,
        skip_first_steps=5,
        guidance=ClassifierGuidance(cutouts=None),
        process_method="pad",
        distance="l1",
    ),
    "ldm": PRESETS["ldm-imagenet"].model_copy(update={"levels": 5, "stop": 5, "distance": "features"}),
}


@pytest.mark.parametrize("name", SMALL)
def test_alone_or_in_company_the_score_is_the_same(name, pixel, latent, convolutional, transformer, pictures):
    # A network with ReLU, random too, amplifies rounding in the guided path.
    denoiser, classifier = {
        "gdm": (pixel, transformer),
        "gdm-pad": (pixel, convolutional),
        "ldm": (latent, convolutional),
    }[name]
    request = Request(classifier, SMALL[name])
    [together] = score_batch(pictures, denoiser, [request])
    assert together.reconstruction.shape == pictures.shape
    for rows in ([2], [3, 0]):
        [alone] = score_batch(pictures[rows], denoiser, [request])
        assert torch.equal(alone.level, together.level[rows])
        assert torch.allclose(alone.score, together.score[rows], atol=1e-4, rtol=1e-3)
        # A vector-quantized image can change by a whole code where two are equally near.
        assert (alone.reconstruction - together.reconstruction[rows]).abs().mean() < 1e-4


def test_samples_stop_at_levels_of_their_own(pixel, convolutional, pictures):
    [scored] = score_batch(pictures, pixel, [Request(convolutional, SMALL["gdm"])])
    assert len(set(scored.level.tolist())) > 1


@pytest.mark.parametrize("which", ["convolutional", "transformer"])
def test_cam_is_a_map_scaled_to_one(which, request, pictures):
    classifier = request.getfixturevalue(which)
    label = classifier(pictures).argmax(1)
    maps = cam_maps(classifier, pictures, label)
    assert maps.shape == (4, 28, 28)
    assert float(maps.min()) >= 0
    assert torch.allclose(maps.amax(dim=(1, 2)), torch.ones(4), atol=1e-3)
    assert cam_mask(classifier, pictures, label, 0.3, (16, 16)).shape == (4, 1, 16, 16)
    # Another class is seen elsewhere.
    assert not torch.allclose(cam_maps(classifier, pictures, (label + 1) % 10), maps, atol=1e-2)


def test_a_vision_transformer_is_guarded(latent, transformer, pictures):
    [scored] = score_batch(pictures, latent, [Request(transformer, SMALL["ldm"])])
    assert torch.isfinite(scored.score).all()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_lower_precision_stops_at_the_same_steps_and_scores_alike(
    precision, pixel, latent, convolutional, transformer, pictures
):
    """Scores within 5 %. Guidance of scale 10 would amplify ten times what the precision loses."""
    mild = SMALL["ldm"].model_copy(update={"distance": "l1", "guidance": LabelGuidance(scale=1.5)})
    for variant, denoiser, classifier in ((SMALL["gdm"], pixel, transformer), (mild, latent, convolutional)):
        lowered = variant.model_copy(update={"precision": precision})
        requests = [Request(classifier, variant), Request(classifier, lowered)]
        full, low = score_batch(pictures[:2], denoiser, requests)
        assert torch.equal(full.level, low.level)
        assert torch.allclose(low.score, full.score, rtol=0.05), (full.score, low.score)


def test_float32_is_the_denoiser_itself(pixel):
    assert in_precision(pixel, "float32") is pixel
    lowered = in_precision(pixel, "bfloat16")
    x, timestep = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    with torch.no_grad():
        noise, exact = lowered.eps(x, timestep, timestep), pixel.eps(x, timestep, timestep)
    assert noise.dtype == torch.float32
    assert 0 < float((noise - exact).abs().max()) < 0.1


def test_an_unconditional_denoiser_refuses_label_guidance(pixel, convolutional, pictures):
    for guidance in (LabelGuidance(), AllLabels()):
        variant = SMALL["gdm-pad"].model_copy(update={"guidance": guidance})
        with pytest.raises(SettingError, match="needs a class-conditional denoiser"):
            score_batch(pictures, pixel, [Request(convolutional, variant)])


def test_too_many_classes_and_too_small_images_are_refused(latent, convolutional, pictures):
    many = NetworkClassifier(resnet18(num_classes=11), "layer4")
    with pytest.raises(SettingError, match="the classifier has 11 classes, the denoiser 10"):
        score_batch(pictures, latent, [Request(many, SMALL["ldm"])])
    vif = SMALL["ldm"].model_copy(update={"distance": "vif"})
    with pytest.raises(SettingError, match="vif takes images from 41x41 pixels up; these are 28x28"):
        score_batch(pictures, latent, [Request(convolutional, vif)])
    with pytest.raises(DataError, match="denoiser takes square ones"):
        score_batch(pictures[..., :20], latent, [Request(convolutional, vif)])


def test_guidance_of_scale_nothing_is_no_guidance(pixel, latent, convolutional, pictures):
    for name, denoiser in (("gdm", pixel), ("ldm", latent)):
        guidance = SMALL[name].guidance.model_copy(update={"scale": 0.0})
        plain = {"distance": "l1", "against": "input"}
        variants = [SMALL[name].model_copy(update={"guidance": each, **plain}) for each in (guidance, NoGuidance())]
        one, other = score_batch(pictures, denoiser, [Request(convolutional, variant) for variant in variants])
        assert (one.reconstruction - other.reconstruction).abs().mean() < 1e-5


def test_the_detector_takes_presets(latent, convolutional, pictures):
    variant = SMALL["ldm"]
    detector = DiffGuard(convolutional, latent, variant)
    found = detector.examine(pictures)
    assert found.unconditional.shape == found.reconstruction.shape == pictures.shape
    picture = detector.picture(pictures)
    side = 28 * (128 // 28)
    assert picture.size == (4 * (side + 4) + 4, 4 * (side + 4) + 4)
    # The first cell is the input.
    shown = torch.tensor(list(picture.crop((4, 4, 4 + side, 4 + side)).resize((28, 28), 0).getdata()))
    assert torch.allclose(shown.view(28, 28, 3).permute(2, 0, 1) / 255, pictures[0], atol=1 / 255)


def test_oracle_label():
    assert [oracle_label("predicted", true, 10, "a") for true in (3, -1)] == [None, None]
    assert [oracle_label("oracle-ind", true, 10, "a") for true in (3, -1)] == [3, None]
    assert oracle_label("oracle", 3, 10, "a") == 3
    # By content alone.
    drawn = torch.tensor([oracle_label("oracle", -1, 10, str(number)) for number in range(500)])
    assert drawn.tolist() == [oracle_label("oracle", -1, 10, str(number)) for number in range(500)]
    assert drawn.bincount(minlength=10).min() > 25


def test_a_given_label_guides_and_the_prediction_is_still_reported(latent, convolutional, pictures):
    predicted = convolutional(pictures).argmax(1)
    other = (predicted + 1) % 10
    requests = [Request(convolutional, SMALL["ldm"])] * 2
    own, given = score_batch(pictures, latent, requests, labels={1: other})
    assert torch.equal(given.label, predicted)
    assert not torch.allclose(own.reconstruction, given.reconstruction)


def test_presets_are_the_published_settings():
    gdm, ldm = PRESETS["gdm-imagenet"], PRESETS["ldm-imagenet"]
    assert (gdm.levels, gdm.max_level, gdm.forback_skip_diff, gdm.precision) == (100, 90, 3, "float16")
    assert gdm.stop.thresholds == {"psnr": 48.5, "dists": 0.38}
    assert (gdm.guidance.scale, gdm.guidance.cutouts, gdm.guidance.cutout_size, gdm.guidance.seed) == (3.0, 8, 224, 100)
    assert (ldm.levels, ldm.guidance.scale, ldm.guidance.cam_cut, ldm.against) == (25, 10.0, 0.3, "input")
