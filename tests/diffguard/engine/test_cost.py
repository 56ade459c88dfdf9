"""The counted cost against what the engine asks of the network."""

import pytest
from diffusers import DDPMScheduler, UNet2DModel
from engine_variants import VARIANTS

from diffguard.engine import Engine, Request, Sample, network_evaluations
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import AllLabels, ClassifierGuidance, LabelGuidance, NoGuidance, Variant

MORE = {
    "mask at w = 1": Variant(stop=3, guidance=LabelGuidance(scale=1, cam_cut=0.2), distance="l1"),
    "w = 0": Variant(stop=3, guidance=LabelGuidance(scale=0), distance="l1", against="unconditional"),
    "against": Variant(stop=3, guidance=LabelGuidance(scale=1), distance="l1", against="unconditional"),
    "w = 2 against": Variant(stop=3, guidance=LabelGuidance(scale=2), distance="l1", against="unconditional"),
    "labels against": Variant(stop=3, guidance=AllLabels(), distance="l1", against="unconditional"),
    "nothing against": Variant(stop=3, guidance=NoGuidance(), distance="l1", against="unconditional"),
    "from the top": Variant(stop=3, forback_skip_diff=0, skip_first_steps=2, guidance=NoGuidance(), distance="l1"),
    "clamped": Variant(stop=10, forback_skip_diff=2, guidance=NoGuidance(), distance="l1"),
    "more levels": Variant(
        grid="latent-diffusion", levels=12, stop=12, forback_skip_diff=3, guidance=NoGuidance(), distance="l1"
    ),
    "all of more levels": Variant(grid="latent-diffusion", levels=12, stop=13, guidance=NoGuidance(), distance="l1"),
}


@pytest.mark.parametrize("name", [*VARIANTS, *MORE])
def test_an_image_costs_what_the_engine_asks(denoiser, classifier, images, name):
    variant = {**VARIANTS, **MORE}[name]
    engine = Engine(denoiser, [Request(classifier, variant)], slots=4)
    [(_, found)] = engine.run([Sample(0, images[0])])
    level = found[0].level
    assert engine.stats.evaluations == network_evaluations(variant, level, 1000, denoiser.num_labels, null_label=True)


def test_a_denoiser_without_labels_is_asked_once_a_move(classifier, images):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    denoiser = PixelDenoiser(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    variant = Variant(
        stop=3, guidance=ClassifierGuidance(cutout_size=7, cutouts=2), distance="l1", against="unconditional"
    )
    engine = Engine(denoiser, [Request(classifier, variant)], slots=4)
    list(engine.run([Sample(0, images[0])]))
    assert engine.stats.evaluations == network_evaluations(variant, 3, 1000, 0, null_label=False)
