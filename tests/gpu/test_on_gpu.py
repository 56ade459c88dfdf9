"""Fixed shapes, CUDA graphs, memory that ends, lower precision, and training on a GPU."""

import pytest
import torch

from diffguard.engine import Engine, Request, Sample
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.patched import PatchedDenoiser
from diffguard.settings import Augmentation, ClassifierTraining, DenoiserTraining, Variant, parse_settings
from diffguard.training import train_classifier, train_denoiser, untrained_denoiser
from diffguard.utils.precision import resolve_precision

VARIANTS = {
    "label": {"levels": 8, "stop": 4, "guidance": {"kind": "label", "scale": 2}, "distance": "l1"},
    "stop": {
        "levels": 8,
        "stop": {"max_level": 6, "thresholds": {"psnr": 60.0}},
        "guidance": {"kind": "classifier", "scale": 300, "cutouts": 2, "cutout_size": 12},
        "distance": "l1",
        "against": "unconditional",
    },
    "logits": {"levels": 8, "stop": 4, "guidance": {"kind": "all-labels"}, "distance": "logits"},
}
SETTINGS = DenoiserTraining(
    patch=2,
    channels=(64, 64),
    attention_head_dim=32,
    scale_shift=True,
    prediction_type="v_prediction",
    timesteps="logit-normal",
    optimizer="muon",
    rate_schedule="warmup-stable-decay",
    warmup_steps=10,
    iterations=60,
    batch_size=32,
    learning_rate=5e-3,
    augmentation=Augmentation(flip=True),
)


def squares():
    """Two classes of RGB images: a bright square in the middle, or none, with some noise."""
    images = torch.randint(0, 40, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[::2, :, 4:12, 4:12] += 200
    return images, torch.arange(64) % 2


def make(device):
    denoiser = untrained_denoiser((3, 16, 16), 2, SETTINGS)
    torch.manual_seed(0)
    for weight in denoiser.unet.parameters():  # its last convolution begins at nothing
        weight.data += 0.02 * torch.randn_like(weight)
    classifier = ConvClassifier(2, width=8, in_channels=3).eval().requires_grad_(False)
    return denoiser.to(device), classifier.to(device)


def scores(denoiser, classifier, device, *, precision="float32", slots=16, fixed=None):
    requests = [
        Request(classifier, parse_settings(Variant, {**values, "precision": precision}, name))
        for name, values in VARIANTS.items()
    ]
    engine = Engine(denoiser, requests, slots=slots, fixed=fixed)
    images = squares()[0][:24].float().to(device) / 255
    found = dict(engine.run(Sample(row, image) for row, image in enumerate(images)))
    return torch.tensor([[found[row][index].score for index in range(len(requests))] for row in range(24)]), engine


def relative(one, other):
    """The largest difference, in units of each variant's spread."""
    return float(((one - other).abs() / other.std(dim=0)).max())


@pytest.fixture(scope="module")
def expected():
    """The scores on the processor, in float32."""
    return scores(*make("cpu"), "cpu")[0]


def test_a_gpu_scores_as_a_processor_does(device, expected):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        assert relative(scores(*make(device), device)[0], expected) < 0.01
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_batches_have_one_shape(device, expected):
    denoiser, classifier = make(device)
    sizes, was = [], denoiser.eps

    def watched(x, timestep, label):
        sizes.append(len(x))
        return was(x, timestep, label)

    denoiser.eps = watched
    fixed, _ = scores(denoiser, classifier, device, fixed=True)
    assert set(sizes) == {16}
    assert relative(fixed, expected) < 0.05


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_scores_alike(device, expected, precision):
    if device.type == "cpu" and precision == "float16":
        pytest.skip("of CUDA alone")
    lowered, _ = scores(*make(device), device, precision=precision)
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(lowered.T, expected.T, strict=True)]
    assert min(correlations) > 0.95


def test_memory_that_ends_halves_the_batches(gpu):
    denoiser, classifier = make(gpu)
    plenty, _ = scores(denoiser, classifier, gpu, slots=16)
    torch.cuda.empty_cache()
    x = torch.randn(2**15, 3, 16, 16, device=gpu)
    torch.cuda.reset_peak_memory_stats()
    where = torch.zeros(2**10, dtype=torch.long, device=gpu)
    with torch.no_grad():
        denoiser.eps(x[: 2**10], where, where)
    per_image = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 2**10
    del x
    torch.cuda.empty_cache()
    # Room for about a thousand images in a call, and four thousand are asked for.
    room = torch.cuda.memory_allocated() + 2**10 * per_image
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(gpu).total_memory)
    try:
        little, engine = scores(denoiser, classifier, gpu, slots=2**12, fixed=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.slots < 2**12
    assert relative(little, plenty) < 0.05


def test_a_denoiser_is_trained_and_goes_on_elsewhere(device, tmp_path):
    images, labels = squares()
    steps = []
    denoiser = train_denoiser(images, labels, 2, SETTINGS, 0, steps.append, device=device, checkpoint=tmp_path / "c.pt")
    assert isinstance(denoiser, PatchedDenoiser)
    assert denoiser.device.type == "cpu"
    assert steps[0].step == 1
    assert steps[-1].step == 60
    assert steps[-1].loss < 0.7 * steps[0].loss
    longer = SETTINGS.model_copy(update={"iterations": 62})
    steps.clear()
    train_denoiser(images, labels, 2, longer, 0, steps.append, checkpoint=tmp_path / "c.pt")
    assert [step.step for step in steps] == [61, 62]


def test_a_classifier_is_trained(device):
    images, labels = squares()
    settings = ClassifierTraining(width=8, blocks=(1, 1), epochs=20, batch_size=16)
    classifier = train_classifier(images, labels, 2, settings, 0, lambda _: None, device=device)
    assert (classifier(images.float() / 255).argmax(dim=1) == labels).float().mean() > 0.95


def test_a_gpu_since_ampere_trains_in_bfloat16(gpu):
    expected = "bfloat16" if torch.cuda.get_device_capability(gpu) >= (8, 0) else "float32"
    assert resolve_precision("auto", gpu) == expected


def test_cuda_graphs_score_alike(gpu, expected):
    denoiser, classifier = make(gpu)
    denoiser.compile(fixed=True)
    first, _ = scores(denoiser, classifier, gpu, fixed=True)
    again, _ = scores(denoiser, classifier, gpu, fixed=True)
    assert relative(first, expected) < 0.05
    assert relative(again, first) < 1e-3
