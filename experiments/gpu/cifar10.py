"""CIFAR-10 on one GPU in a few minutes: a classifier, a class-conditional denoiser, scores of every row.

    python experiments/gpu/cifar10.py --images FOLDER --out FOLDER [--resume FOLDER]

Results go to results.json as they come. At the end the weights, in float16, and the scores of each image are
weights.tar.0, .1, …, parts of one archive of at most 16 MiB each. --resume takes the folder of these, or a denoiser's
in Diffusers' layout, and trains on. Choices are made on validation; test images are only scored.
"""

import argparse
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from cifar10_images import Split, read_splits
from results import Results
from torch import Tensor

from diffguard.detectors.baselines import detect, fit_baseline
from diffguard.detectors.combination import fit_combination
from diffguard.detectors.fitting import fit_variant
from diffguard.engine import Engine, Request, Sample
from diffguard.metrics import resample_scores
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.denoisers.base import in_precision
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import (
    RECIPES,
    Augmentation,
    Baseline,
    ClassifierTraining,
    Combination,
    DenoiserTraining,
    Variant,
    parse_settings,
)
from diffguard.training import TrainingStep, loop, train_classifier, train_denoiser
from diffguard.training.previews import labels_as_classifier, sample_grid
from diffguard.utils.precision import resolve_precision

ROOT = Path(__file__).resolve().parents[2]
PART = 16 * 2**20
"""Bytes of a part of what comes back."""

CLASSIFIER = ClassifierTraining(
    width=64,
    blocks=(2, 2, 2, 2),
    epochs=200,
    batch_size=512,
    learning_rate=5e-3,
    weight_decay=0.05,
    augmentation=Augmentation(crop=4, flip=True),
)
NETWORKS = {  # by patch, of about the same work a step; the better one after a short training is trained on
    4: RECIPES["cifar10-patch-gpu"],
    2: RECIPES["cifar10-patch-gpu"].model_copy(update={"patch": 2, "channels": (128, 320, 384)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the two archives")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="what an earlier run left, or a denoiser's folder")
    parser.add_argument("--classifier-seconds", type=float, default=60)
    parser.add_argument("--denoiser-seconds", type=float, default=230)
    parser.add_argument("--rehearse", action="store_true", help="the same with tiny networks and few images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    splits = read_splits(options.images, 40 if options.rehearse else 1000)
    counts = {name: len(split.names) for name, split in splits.items()}
    results.add("cifar10/images", {"counts": counts, "read_seconds": time.monotonic() - began})
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        former = None if options.resume is None else unpack(options.resume, work / "former")
        classifier = get_classifier(splits, former, options, device, results)
        save_classifier(deepcopy(classifier).half(), work / "classifier.safetensors")
        classifier.to(device)
        denoiser = get_denoiser(splits, former, options, device, results, work)
        pack(work, options.out, denoiser, None)
        denoiser.to(device)
        table = score(splits, classifier, denoiser, device, options.rehearse, results)
        pack(work, options.out, denoiser, table)


def get_classifier(
    splits: dict[str, Split], former: Path | None, options: argparse.Namespace, device: torch.device, results: Results
) -> Any:
    """The former one, or one that is trained now."""
    began, steps = time.monotonic(), list[TrainingStep]()
    if former is not None and (former / "classifier.safetensors").is_file():
        classifier: Any = load_classifier(former / "classifier.safetensors")
    else:
        settings = CLASSIFIER.model_copy(update={"minutes": options.classifier_seconds / 60})
        if options.rehearse:  # by epochs: after so many seconds a slow processor may not know every class
            tiny = {"width": 8, "blocks": (0, 1, 1), "batch_size": 64, "epochs": 25, "minutes": None}
            settings = settings.model_copy(update=tiny)
        train = splits["train"]
        classifier = train_classifier(train.images, train.labels, 10, settings, 0, steps.append, device=device)
    classifier.to(device)
    accuracy = {
        name: float((logits(classifier, splits[name], device).argmax(1) == splits[name].labels).float().mean())
        for name in ("validation", "test")
    }
    trained = _training(steps, len(splits["train"].names)) if steps else {"from": str(options.resume)}
    results.add("cifar10/classifier", {**trained, "accuracy": accuracy, "seconds": time.monotonic() - began})
    return classifier.cpu()


def get_denoiser(
    splits: dict[str, Split],
    former: Path | None,
    options: argparse.Namespace,
    device: torch.device,
    results: Results,
    work: Path,
) -> PixelDenoiser:
    """One that is trained now, from the former one's weights if there are any."""
    train, meter = splits["train"], splits["validation"].every(500)
    loop.PREVIEW_SHARE = 0.1
    start, seen_before = None, 0
    networks = NETWORKS
    if options.rehearse:
        tiny = {"channels": (32, 32), "attention_head_dim": 32, "batch_size": 32}
        networks = {patch: settings.model_copy(update=tiny) for patch, settings in NETWORKS.items()}
    if former is not None and (former / "denoiser").is_dir():
        start = load_denoiser(former / "denoiser")
        config: Any = start.unet.config
        shape = {"patch": getattr(start, "patch", 1), "channels": tuple(config.block_out_channels)}
        networks = {shape["patch"]: networks[4].model_copy(update=shape)}
        if (former / "training.json").is_file():
            seen_before = json.loads((former / "training.json").read_text(encoding="utf-8"))["images_seen"]
    steps: dict[int, list[TrainingStep]] = {patch: [] for patch in networks}
    accuracies: list[dict[str, float]] = []
    began = time.monotonic()

    def go_on(patch: int, seconds: float, *, measured: bool) -> PixelDenoiser:
        settings = networks[patch].model_copy(
            update={
                "minutes": seconds / 60,
                "iterations": 10**7,
                "checkpoint_minutes": 0.1 if options.rehearse else 0.5,
            }
        )
        if not measured:  # its rate stays up: it is trained on
            settings = settings.model_copy(update={"decay_fraction": 1e-6})

        def look(step: int, denoiser: PixelDenoiser) -> None:
            if measured:
                seen = seen_before + step * settings.batch_size
                accuracies.append({"images_seen": seen, "accuracy": accuracy(denoiser, meter, settings, device)})
                results.add("cifar10/denoiser-accuracy", accuracies)

        return train_denoiser(
            train.images,
            train.labels,
            10,
            settings,
            0,
            steps[patch].append,
            device=device,
            checkpoint=work / f"patch-{patch}.pt",
            preview=look,
            start=start,
        )

    chosen, trial = next(iter(networks)), 0.0
    if len(networks) > 1:
        trial = options.denoiser_seconds / 16
        for patch in networks:
            go_on(patch, trial, measured=False)
        # Both predict v in pixels, so that their losses compare.
        losses = {patch: float(np.mean([step.loss for step in found[-3:]])) for patch, found in steps.items()}
        speeds = {patch: found[-1].images_per_second for patch, found in steps.items()}
        chosen = min(losses, key=lambda patch: losses[patch])
        results.add("cifar10/patch", {"seconds": trial, "loss": losses, "images_per_second": speeds, "chosen": chosen})
    # A checkpoint's clock goes on: the time of its trial counts. A slow processor may have used up all with its trials.
    left = max(options.denoiser_seconds - (time.monotonic() - began), 1.0)
    denoiser = go_on(chosen, trial + left, measured=True)
    found, epoch = steps[chosen], len(train.names)
    seen = seen_before + found[-1].images_seen
    results.add(
        "cifar10/denoiser",
        {
            "settings": networks[chosen].model_dump(mode="json"),
            "parameters": sum(weight.numel() for weight in denoiser.unet.parameters()),
            "precision": resolve_precision(networks[chosen].precision, device),
            **_training(found, epoch),
            "images_seen": seen,
            "epochs": seen / epoch,
            "seconds": time.monotonic() - began,
            "accuracy_as_classifier": accuracies[-1]["accuracy"],
        },
    )
    (work / "training.json").write_text(json.dumps({"images_seen": seen}), encoding="utf-8")
    lowered = in_precision(denoiser.to(device), resolve_precision("auto", device))
    sample_grid(lowered, rows=2 if options.rehearse else 8).save(work / "samples.png")
    return denoiser.to("cpu")


def accuracy(denoiser: PixelDenoiser, meter: Split, settings: DenoiserTraining, device: torch.device) -> float:
    lowered = in_precision(denoiser.to(device), resolve_precision(settings.precision, device))
    found = labels_as_classifier(lowered, meter.images.float() / 255, batch_size=5000)
    return int((found == meter.labels).sum()) / len(meter.labels)


def _training(steps: list[TrainingStep], epoch: int) -> dict[str, Any]:
    """What a training has cost, and its curve at fifty places."""
    rows = sorted({int(row) for row in np.linspace(0, len(steps) - 1, 50)})
    return {
        "steps": steps[-1].step,
        "images_seen": steps[-1].images_seen,
        "epochs": steps[-1].images_seen / epoch,
        "images_per_second": float(np.median([step.images_per_second for step in steps[len(steps) // 4 :]])),
        "curve": [[steps[row].step, round(steps[row].loss, 4), round(steps[row].gradient_norm, 3)] for row in rows],
    }


def logits(classifier: Any, split: Split, device: torch.device) -> Tensor:
    return torch.cat(
        [predict_logits(classifier, part.to(device).float() / 255).cpu() for part in torch.split(split.images, 512)]
    )


class Batches:
    """Batches (images, labels) of a split on the device, as often as they are asked for."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self.split, self.device = split, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(
            torch.split(self.split.images, 512), torch.split(self.split.labels, 512), strict=True
        ):
            yield images.to(self.device).float() / 255, labels.to(self.device)

    def images(self) -> Iterator[Tensor]:
        for images, _ in self:
            yield images


def score(
    splits: dict[str, Split], classifier: Any, denoiser: Any, device: torch.device, rehearse: bool, results: Results
) -> pd.DataFrame:
    """Every row of params.yaml that can be scored here, of every image but train's; metrics go to the results."""
    began = time.monotonic()
    written = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    left_out: dict[str, str] = {}
    requests: dict[str, Request] = {}
    precision = resolve_precision("auto", device)
    for name, values in written["score"]["variants"].items():
        variant = parse_settings(Variant, {**values, "precision": precision}, f"params.yaml: {name}")
        try:
            fitted = fit_variant(
                variant,
                denoiser,
                classifier,
                Batches(splits["calibration"], device).images(),
                Batches(splits["train"].every(2000), device).images(),
            )
            if getattr(variant.guidance, "cam_cut", None) is not None:
                import pytorch_grad_cam  # noqa: F401
            requests[name] = Request(classifier, fitted)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"
    scored = {name: split for name, split in splits.items() if name != "train"}
    everything = [(name, row) for name, split in scored.items() for row in range(len(split.names))]
    images = torch.cat([split.images for split in scored.values()])
    engine = Engine(denoiser, list(requests.values()), slots=64 if rehearse else 1024)
    columns = {name: np.full(len(everything), np.nan) for name in requests}
    for row, found in engine.run(Sample(row, image.to(device).float() / 255) for row, image in enumerate(images)):
        for index, name in enumerate(requests):
            columns[name][row] = found[index].score
    diffusion_seconds = time.monotonic() - began
    of_logits = torch.cat([logits(classifier, split, device) for split in scored.values()])
    train = Batches(splits["train"], device)
    for name, values in written["score"]["baselines"].items():
        try:
            detector = fit_baseline(name, parse_settings(Baseline, values, name), classifier, train, device)
            columns[name] = np.concatenate(
                [
                    detect(detector, part.to(device).float() / 255, of.to(device)).double().cpu().numpy()
                    for part, of in zip(torch.split(images, 512), torch.split(of_logits, 512), strict=True)
                ]
            )
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"
    place = np.array([name for name, _ in everything])
    for name, values in written["combine"].items():
        combination = parse_settings(Combination, values, name)
        if missing := [member for member in combination.of if member not in columns]:
            left_out[name] = f"of {missing[0]}, which is left out"
            continue
        members = {
            split: {member: columns[member][place == split] for member in combination.of}
            for split in ("calibration", "validation", "validation-near")
        }
        sides = (members["validation"], {"near": members["validation-near"]})
        combined = fit_combination(combination, members["calibration"], sides)
        columns[name] = combined.score({member: columns[member] for member in combination.of})
    table = pd.DataFrame(
        {
            "image": [name for split in scored.values() for name in split.names],
            "split": place,
            "label": torch.cat([split.labels for split in scored.values()]).numpy(),
            "predicted": of_logits.argmax(1).numpy(),
            **columns,
        }
    )
    metrics = {}
    for name in columns:
        ind, near = (table.loc[table["split"] == split, name].to_numpy() for split in ("test", "near"))
        found = resample_scores([ind], {"near": [near]}, {"near": ["near"]}).summary()["near"]
        metrics[name] = {each: found[each] for each in ("auroc", "fpr95")}
        print(f"{name:24} near AUROC {found['auroc']['value']:.4f}", flush=True)
    results.add(
        "cifar10/scores",
        {
            "precision": precision,
            "images": {name: len(split.names) for name, split in scored.items()},
            "left_out": left_out,
            "evaluations_per_image": engine.stats.evaluations / len(everything),
            "occupancy": engine.stats.occupancy,
            "images_per_second": len(everything) / diffusion_seconds,
            "diffusion_seconds": diffusion_seconds,
            "seconds": time.monotonic() - began,
            "metrics": metrics,
        },
    )
    return table


def pack(work: Path, out: Path, denoiser: PixelDenoiser, table: pd.DataFrame | None) -> None:
    """Write the parts of the archive anew."""
    shutil.rmtree(work / "denoiser", ignore_errors=True)
    lowered = deepcopy(denoiser)
    lowered.unet = lowered.unet.cpu().half()
    save_denoiser(lowered, work / "denoiser")
    if table is not None:
        table.to_csv(work / "scores.csv", index=False, float_format="%.6g")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        for name in ("denoiser", "classifier.safetensors", "training.json", "samples.png", "scores.csv"):
            if (work / name).exists():
                file.add(work / name, name)
    content = archive.getbuffer()
    for old in out.glob("weights.tar.*"):
        old.unlink()
    for number, first in enumerate(range(0, len(content), PART)):
        (out / f"weights.tar.{number}").write_bytes(content[first : first + PART])


def unpack(folder: Path, to: Path) -> Path:
    """What an earlier run left: the folder of `pack`'s archive, or of a denoiser alone."""
    parts = sorted(folder.glob("weights.tar.*"), key=lambda path: int(path.suffix[1:]))
    to.mkdir(parents=True)
    if parts:
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as file:
            file.extractall(to, filter="data")
    elif (folder / "unet").is_dir():
        (to / "denoiser").symlink_to(folder.resolve())
    else:
        raise SystemExit(f"error: {folder}: neither weights.tar.0 nor a denoiser is here")
    return to


if __name__ == "__main__":
    main()
