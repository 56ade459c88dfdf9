"""The published architectures at the published settings, with random weights: what an image costs.

    python experiments/gpu/published.py --out FOLDER [--seconds 140]

For the 256x256 guided-diffusion model and the latent model, images are scored by the published schedule of network
calls, by plain batching and by the engine, in lower precision, compiled or not. Of each: evaluations an image,
images/s, the share of the device's own rate of matrix products that its network makes, and peak memory. Rows that
do not fit into the time are named as left out. The arithmetic of all three is the library's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import Results
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
from engine import make_denoiser, make_variant, plain_batches
from published_models import build
from published_schedule import Counting, published_scores

from diffguard.diffusion.reference import reconstruct
from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import get_distance
from diffguard.engine import Engine, Request, Sample, Stats
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.settings import LabelGuidance, Variant
from diffguard.utils.precision import resolve_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=140, help="no row begins that would not be done by then")
    parser.add_argument("--rehearse", action="store_true", help="the same with small networks and few images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(options.out)
    rate = matrix_rate(device, options.rehearse)
    results.add("published/matrix_products", {"tflops": {name: round(each / 1e12, 2) for name, each in rate.items()}})
    rows: list[dict[str, Any]] = []
    takes: dict[str, float] = {}
    for family, schedule, precision, compiled in plan(device):
        key = f"{family} {schedule} {'compiled' if compiled else ''}"
        # A compiled row takes some time to compile; one that was measured in another precision takes as long again.
        expected = takes.get(key, 45.0 if compiled else 10.0)
        row = {"model": family, "schedule": schedule, "precision": precision, "compiled": compiled}
        if time.monotonic() + (0 if options.rehearse else expected) > deadline:
            rows.append({**row, "left_out": "no time was left"})
            results.add("published/rows", rows)
            continue
        began = time.monotonic()
        try:
            rows.append({**row, **measure(family, schedule, precision, compiled, device, rate, options.rehearse)})
        except Exception as error:  # the other rows go on
            rows.append({**row, "failed": f"{type(error).__name__}: {error}"[:300]})
        takes[key] = time.monotonic() - began
        results.add("published/rows", rows)


def plan(device: torch.device) -> list[tuple[str, str, str, bool]]:
    """(model, schedule, precision, compiled), what matters most first; each once where both precisions are the same."""
    low = resolve_precision("auto", device)
    other = "float16" if device.type == "cuda" else "float32"
    rows = [
        ("pixel", "engine", low, False),
        ("pixel", "published schedule", other, False),
        ("pixel", "plain batching", low, False),
        ("latent", "engine", low, False),
        ("latent", "published schedule", other, False),
        ("latent", "plain batching", low, False),
        ("latent", "engine", low, True),
        ("pixel", "engine", low, True),
        ("pixel", "engine", other, False),
        ("latent", "engine", other, False),
        ("pixel", "plain batching", other, False),
        ("latent", "plain batching", other, False),
    ]
    return list(dict.fromkeys(rows))


def matrix_rate(device: torch.device, rehearse: bool) -> dict[str, float]:
    """Operations a second of a large matrix product, by precision."""
    side = 1024 if rehearse or device.type == "cpu" else 8192
    found = {}
    for name in ("bfloat16", "float16", "float32"):
        if name == "float16" and device.type == "cpu":
            continue
        left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, name)) for _ in range(2))
        best = 0.0
        for _ in range(3 if device.type == "cpu" else 8):
            wait(device)
            began = time.perf_counter()
            left @ right
            wait(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
        found[name] = best
    return found


def measure(
    family: str,
    schedule: str,
    precision: str,
    compiled: bool,
    device: torch.device,
    rate: dict[str, float],
    rehearse: bool,
) -> dict[str, Any]:
    """What so many images have cost under one schedule."""
    torch.manual_seed(0)
    if family == "pixel":
        denoiser: Any = make_denoiser(device, published=not rehearse)
        variant = make_variant(published=not rehearse, precision=precision)
        side = 56 if rehearse else 224
    else:
        denoiser, _ = build("latent", device) if not rehearse else small_latent(device)
        variant = latent_variant(precision, 5 if rehearse else 25)
        side = denoiser.image_shape[1]
        denoiser.channels_last()
    classifier = ConvClassifier(10, width=16, in_channels=3, mean=0.0, std=1.0).eval().requires_grad_(False).to(device)
    slots = 4 if rehearse else {"pixel": 8, "latent": 64}[family]
    # Enough that the last images, when batches are no longer full, weigh little; the published schedule is slow, and
    # its speed does not depend on how many there are.
    count = 2 if schedule == "published schedule" and family == "pixel" else slots if rehearse else slots * 2
    if schedule == "published schedule" and family == "latent":
        count = slots // 4
    images = gratings(count, side).to(device)
    flops = flops_of(denoiser, device)
    if compiled and device.type == "cpu":  # what a processor compiles to takes minutes to build
        denoiser.unet.compile(backend="aot_eager", dynamic=False)
    elif compiled:
        denoiser.compile(fixed=True)

    def engine_run(images: Tensor, variant: Variant) -> Stats:
        engine = Engine(denoiser, [Request(classifier, variant)], slots=slots, fixed=compiled or None)
        for _ in engine.run(Sample(row, image) for row, image in enumerate(images)):
            pass
        return engine.stats

    if compiled:
        engine_run(images[:1], variant.model_copy(update={"stop": 1}))  # the first call compiles
    counting = Counting(denoiser)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    began = time.perf_counter()
    if schedule == "engine":
        stats = engine_run(images, variant)
        evaluations = stats.evaluations
        extra: dict[str, Any] = {"occupancy": stats.occupancy, "network_calls": stats.calls}
    else:
        runs: dict[tuple[str, str], Callable[[], Any]] = {
            ("pixel", "published schedule"): lambda: published_scores(images, counting, classifier, variant),
            ("pixel", "plain batching"): lambda: plain_batches(images, counting, classifier, variant, slots),
            ("latent", "published schedule"): lambda: latent_scores(images, counting, classifier, variant, 1),
            ("latent", "plain batching"): lambda: latent_scores(images, counting, classifier, variant, slots),
        }
        runs[family, schedule]()
        evaluations = counting.counts.image_forwards
        extra = {"network_calls": counting.counts.calls}
    wait(device)
    seconds = time.perf_counter() - began
    return {
        **extra,
        "images": count,
        "batch": slots if schedule != "published schedule" else None,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "evaluations_per_image": evaluations / count,
        "gflop_an_evaluation": flops / 1e9,
        "share_of_matrix_rate": evaluations * flops / seconds / rate.get(precision, rate["float32"]),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def gratings(count: int, side: int) -> Tensor:
    """Waves of contrasts from 0.1 to 1 in shuffled order, [count, 3, side, side], which stop at different levels."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wave = torch.sin(x * 0.7 + y * 0.3).expand(count, 3, side, side)
    contrast = torch.linspace(0.1, 1, count)[torch.randperm(count, generator=generator)]
    return 0.5 + 0.5 * wave * contrast.view(-1, 1, 1, 1)


def latent_variant(precision: str, levels: int) -> Variant:
    """The published settings of the latent model, without the mask, which changes no evaluation."""
    return Variant(
        grid="latent-diffusion",
        levels=levels,
        stop=levels,
        guidance=LabelGuidance(scale=10.0),
        distance="l1",
        precision=precision,
    )


def latent_scores(images: Tensor, denoiser: Any, classifier: Any, variant: Variant, batch: int) -> Tensor:
    """Inversion, then reconstruction with twice the batch, batch after batch; published: image after image."""
    scores = []
    for part in torch.split(images, batch):
        sampler = Sampler.of(variant, denoiser, part.shape[-1])
        with torch.no_grad():
            label = classifier(part).argmax(dim=1)
            [end] = sampler.invert(sampler.encode(part), [variant.stop], classifier, label)
            start = sampler.schedule.start(end.level, variant.forback_skip_diff, variant.skip_first_steps)
            assert isinstance(variant.guidance, LabelGuidance)
            made = reconstruct(
                sampler.denoiser,
                end.latents,
                start,
                sampler.schedule,
                label,
                scale=variant.guidance.scale,
                clip=variant.clip,
            )
            scores.append(get_distance(variant.distance)(part, sampler.decode(made), classifier))
    return torch.cat(scores)


def small_latent(device: torch.device) -> tuple[Any, Any]:
    """The latent model's architecture in small."""
    from diffusers import UNet2DConditionModel, VQModel

    from diffguard.models.denoisers.latent import LatentDenoiser, label_embedder
    from diffguard.models.denoisers.noise_schedule import make_scheduler

    with device:
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            layers_per_block=1,
        )
        autoencoder = VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            num_vq_embeddings=64,
        )
        embedder = label_embedder(torch.randn(11, 32))
    return LatentDenoiser(unet, autoencoder, embedder, make_scheduler("scaled_linear", 0.0015, 0.0195)), None


def flops_of(denoiser: Any, device: torch.device) -> int:
    """Operations of one evaluation, as many as its matrix products and convolutions have."""
    latents = denoiser.encode(torch.zeros(1, *denoiser.image_shape, device=device))
    where = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser.eps(latents, where, where)
    return int(counter.get_total_flops())


wait: Callable[[torch.device], None] = lambda device: torch.cuda.synchronize() if device.type == "cuda" else None  # noqa: E731


if __name__ == "__main__":
    main()
