"""The engine against the published schedule and plain batching: one run, the same weights, the same images.

    python experiments/engine.py [--images 48] [--output experiments/results/engine.json]

Three ways to score images under classifier guidance with the unconditional reconstruction and an
adaptive stop, as published: (a) the published schedule of network calls, (b) plain batching, each
phase of the library by itself, batch after batch, (c) the engine. Weights are random, of the size that
the captured runs have (64x64, 32 channels), or --published of the full 256x256 architecture; images
are letters of different contrast, so that they stop at different steps. With trained digits models at
hand, also: all variants of params.yaml in one run against each by itself.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import peak_memory
from published_schedule import Counting, published_scores
from torch import Tensor

from diffguard.detectors.fitting import fit_variant
from diffguard.diffusion.reference import reconstruct
from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import get_distance
from diffguard.engine import Engine, Request, Sample, tune
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.classifiers.files import load_classifier
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.conversion import PUBLISHED_PIXEL, UNetShape, pixel_config
from diffguard.models.denoisers.loading import load_denoiser
from diffguard.models.denoisers.noise_schedule import make_scheduler
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import AdaptiveStop, ClassifierGuidance, Variant

SMALL = UNetShape(3, 6, 2, (32, 32, 64), (False, False, True))
"""The captured runs' architecture."""

SCHEDULES = ("published schedule", "plain batching", "engine")


def make_images(count: int, side: int) -> Tensor:
    """RGB letters of contrasts from 0.1 to 1, in random order, [count, 3, side, side]."""
    from tasks.sources.synthetic import letters

    rng = np.random.default_rng(0)
    drawn = letters(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", side)
    gray = torch.stack([torch.tensor(next(drawn)[1]) for _ in range(count)]).float()[:, None] / 255
    contrast = torch.tensor(rng.permutation(np.linspace(0.1, 1, count))).float()[:, None, None, None]
    return (0.5 + (gray - 0.5) * contrast).expand(-1, 3, -1, -1).contiguous()


def make_denoiser(device: torch.device, *, published: bool) -> PixelDenoiser:
    """Random weights that predict little noise, so that contrast decides where an image stops."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    shape, side, heads = (PUBLISHED_PIXEL, 256, 64) if published else (SMALL, 64, 16)
    with device:
        unet = UNet2DModel(**pixel_config(shape, side, heads))
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
        unet.conv_out.bias *= 0.1
    return PixelDenoiser(unet, make_scheduler("linear", 1e-4, 0.02, learned_variance=True)).channels_last()


def make_variant(*, published: bool, precision: str) -> Variant:
    """The published settings, at the captured runs' size or the published one; PSNR alone stops."""
    return Variant(
        grid="guided-diffusion",
        levels=100 if published else 20,
        stop=AdaptiveStop(max_level=90 if published else 17, thresholds={"psnr": 62.0}),
        forback_skip_diff=3,
        guidance=ClassifierGuidance(scale=3.0, cutouts=8, cutout_size=224 if published else 56, seed=100),
        process_method="resize",
        distance="l1",
        against="unconditional",
        precision=precision,
    )


def plain_batches(
    images: Tensor, denoiser: Any, classifier: Any, variant: Variant, batch: int
) -> tuple[Tensor, Tensor]:
    """Inversion, then both reconstructions, batch after batch; images leave a batch as they stop."""
    scores, levels = [], []
    for part in torch.split(images, batch):
        sampler = Sampler.of(variant, denoiser, part.shape[-1])
        label = predict_logits(classifier, part).argmax(dim=1)
        with torch.no_grad():
            [end] = sampler.invert(sampler.encode(part), [variant.stop], classifier, label)
        start = sampler.schedule.start(end.level, variant.forback_skip_diff, variant.skip_first_steps)
        assert isinstance(variant.guidance, ClassifierGuidance)
        guided, unguided = (
            sampler.decode(
                reconstruct(
                    sampler.denoiser, end.latents, start, sampler.schedule, label, gradient=gradient, clip=variant.clip
                )
            )
            for gradient in (sampler.clean_gradient(variant.guidance, classifier), None)
        )
        scores.append(get_distance(variant.distance)(unguided, guided, classifier))
        levels.append(end.level)
    return torch.cat(scores), torch.cat(levels)


def engine_scores(
    images: Tensor, denoiser: Any, classifier: Any, variant: Variant, slots: int
) -> tuple[Tensor, Tensor, Engine]:
    """Scores, stop levels and the engine that computed them."""
    engine = Engine(denoiser, [Request(classifier, variant)], slots=slots)
    by_row = dict(engine.run(Sample(row, image) for row, image in enumerate(images)))
    results = [by_row[row][0] for row in range(len(images))]
    scores = torch.tensor([result.score for result in results])
    return scores, torch.tensor([result.level for result in results]), engine


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One schedule, in a process of its own: its cost, scores and stop levels."""
    denoiser = make_denoiser(device, published=options.published)
    torch.manual_seed(1)
    classifier = ConvClassifier(10, width=16, in_channels=3, mean=0.0, std=1.0).eval().requires_grad_(False).to(device)
    variant = make_variant(published=options.published, precision=options.precision)
    images = make_images(options.images, 224 if options.published else 56).to(device)
    counting, slots = Counting(denoiser), options.slots
    if options.compile and name == "engine":
        denoiser.compile(fixed=True)
        engine_scores(images[: slots + 1], denoiser, classifier, variant, slots)
    started = time.perf_counter()
    engine: Engine | None = None
    if name == "published schedule":
        pairs = [published_scores(part, counting, classifier, variant) for part in torch.split(images, options.batch)]
        score, level = torch.cat([s for s, _ in pairs]), torch.cat([each for _, each in pairs])
    elif name == "plain batching":
        score, level = plain_batches(images, counting, classifier, variant, slots)
    else:
        score, level, engine = engine_scores(images, counting, classifier, variant, slots)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    batch = options.batch if name == "published schedule" else slots
    counts = counting.counts
    evaluations = engine.stats.evaluations if engine else counts.image_forwards
    row = {
        "network_calls": counts.calls,
        "evaluations_per_image": evaluations / len(images),
        "mean_occupancy": engine.stats.occupancy if engine else evaluations / (counts.calls * batch),
        "batch": batch,
        "seconds": seconds,
        "images_per_second": len(images) / seconds,
        "peak_memory_mib": peak_memory(device),
    }
    return {"row": row, "scores": score.tolist(), "levels": level.tolist()}


def compare(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The three schedules, one after the other, each in a process of its own, so that its memory is its own."""
    denoiser = make_denoiser(device, published=options.published)
    slots = options.slots or tune(denoiser, "float32", seconds=20 if device.type == "cuda" else 4).slots
    found = {}
    for name in SCHEDULES:
        command = [sys.executable, *sys.argv, "--slots", str(slots), "--schedule", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {found[name]['row']['seconds']:.1f} s", file=sys.stderr, flush=True)
    rows = {name: each["row"] for name, each in found.items()}
    first = rows["published schedule"]
    for row in rows.values():
        row["speed_ratio"] = first["seconds"] / row["seconds"]
        row["evaluation_ratio"] = first["evaluations_per_image"] / row["evaluations_per_image"]
    scores = {name: np.array(each["scores"]) for name, each in found.items()}
    return {
        "images": options.images,
        "stop_levels": [min(found["engine"]["levels"]), max(found["engine"]["levels"])],
        "largest_score_difference": max(float(np.abs(each - scores["engine"]).max()) for each in scores.values()),
        "rows": rows,
    }


def digits_together(device: torch.device, limit: int) -> dict[str, Any] | None:
    """All variants of params.yaml in one run against each by itself; None where no model is trained."""
    from tasks.common.files import read_images, read_manifest
    from tasks.config.params import load_params
    from tasks.config.project import ROOT

    home = ROOT / "data" / "digits"
    if not (home / "models" / "seed-0" / "denoiser").is_dir():
        return None
    denoiser = load_denoiser(home / "models/seed-0/denoiser").to(device).channels_last()
    classifier = load_classifier(home / "models/seed-0/ordinary/model.safetensors").to(device)
    manifest = read_manifest(home / "manifest.parquet")
    images = read_images(home, manifest[manifest["split"] == "test"].iloc[:: max(1, 900 // limit)])
    calibration, train = (read_images(home, manifest[manifest["split"] == each]) for each in ("calibration", "train"))
    variants = {
        name: fit_variant(variant, denoiser, classifier, [calibration], [train])
        for name, variant in load_params().score.variants.items()
    }
    slots = tune(denoiser, "float32").slots

    def run(names: list[str]) -> tuple[int, float]:
        engine = Engine(denoiser, [Request(classifier, variants[name]) for name in names], slots=slots)
        started = time.perf_counter()
        for _ in engine.run(Sample(row, image) for row, image in enumerate(images)):
            pass
        return engine.stats.evaluations, time.perf_counter() - started

    run(list(variants)[:1])
    alone = {name: run([name]) for name in variants}
    evaluations, seconds = run(list(variants))
    return {
        "images": len(images),
        "slots": slots,
        "together": {"evaluations_per_image": evaluations / len(images), "seconds": seconds},
        "separately": {
            "evaluations_per_image": sum(e for e, _ in alone.values()) / len(images),
            "seconds": sum(s for _, s in alone.values()),
        },
        "share_of_separate_seconds": seconds / sum(s for _, s in alone.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8, help="of the published schedule's inversion")
    parser.add_argument("--slots", type=int, help="of plain batching and the engine; measured if not given")
    parser.add_argument("--published", action="store_true", help="the full 256x256 architecture")
    parser.add_argument("--precision", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="the engine's network")
    parser.add_argument("--schedule", choices=SCHEDULES, help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.schedule is not None:
        print(json.dumps(measure(options.schedule, options, device)))
        return
    report = {
        "command": "python " + " ".join(["experiments/engine.py", *sys.argv[1:]]),
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "schedules": compare(options, device),
        "digits": digits_together(device, 300),
    }
    print(table(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    schedules = report["schedules"]
    lines = [
        "| schedule | network calls | evaluations an image | occupancy | images/s | memory | speed | evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in schedules["rows"].items():
        lines.append(
            f"| {name} (batch {row['batch']}) | {row['network_calls']} | {row['evaluations_per_image']:.1f} | "
            f"{row['mean_occupancy']:.1%} | {row['images_per_second']:.3f} | {row['peak_memory_mib']:.0f} MiB | "
            f"{row['speed_ratio']:.2f}x | {row['evaluation_ratio']:.2f}x fewer |"
        )
    low, high = schedules["stop_levels"]
    lines.append(f"\n{schedules['images']} images, which stop at levels {low} to {high}.")
    if digits := report["digits"]:
        lines.append(
            f"All variants of digits at once: {digits['together']['seconds']:.1f} s and "
            f"{digits['together']['evaluations_per_image']:.1f} evaluations an image, "
            f"{digits['share_of_separate_seconds']:.0%} of the time of separate runs "
            f"({digits['separately']['seconds']:.1f} s, {digits['separately']['evaluations_per_image']:.1f})."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
