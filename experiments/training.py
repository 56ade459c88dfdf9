"""Speed of the recipes' networks: training and prediction, in float32 and in the precision that the device is quick in.

    python experiments/training.py [--output experiments/results/training.json]

Images a second of a training as it is, the optimizer included, and of `eps`, the median over repeats; rows take turns,
so that other work on the machine weighs on all alike. Images are noise, which costs what pictures cost.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from diffguard.models.denoisers.base import in_precision
from diffguard.settings import RECIPES, DenoiserTraining, parse_settings
from diffguard.training import TrainingStep, train_denoiser, untrained_denoiser
from diffguard.utils.precision import resolve_precision

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
"""Of a training in a turn, the first aside: it takes memory for the first time."""


def rows(device: torch.device) -> list[tuple[str, DenoiserTraining, tuple[int, int, int]]]:
    """(name, settings, shape of the images); the first is what the others are compared with."""
    low = resolve_precision("auto", device)
    written = yaml.safe_load((ROOT / "data" / "benchmarks" / "digits.yaml").read_text(encoding="utf-8"))["denoiser"]
    del written["kind"]
    digits = parse_settings(DenoiserTraining, written, "digits.yaml")
    chosen = []
    for name in ("cifar10-cfg", "cifar10-cpu", "cifar10-patch"):
        # Its own batch of 256 would be half an hour's work here; a smaller one is not slower by the image.
        settings = RECIPES[name].model_copy(update={"batch_size": 32} if name == "cifar10-cfg" else {})
        chosen.append((name, settings, (3, 32, 32)))
    chosen.append(("digits", digits, (1, 8, 8)))
    return [
        (f"{name} {precision}", settings.model_copy(update={"precision": precision}), shape)
        for name, settings, shape in chosen
        for precision in dict.fromkeys(("float32", low))
    ]


def training_speed(settings: DenoiserTraining, shape: tuple[int, int, int], device: torch.device) -> float:
    """Images a second of some steps."""
    steps: list[TrainingStep] = []
    few = settings.model_copy(update={"iterations": STEPS + 1, "minutes": None})
    images = torch.randint(0, 256, (2 * few.batch_size, *shape), dtype=torch.uint8)
    began: list[float] = []

    def note(step: TrainingStep) -> None:
        steps.append(step)
        began.append(time.perf_counter())

    train_denoiser(images, torch.arange(len(images)) % 10, 10, few, 0, note, device=device)
    return few.batch_size * (steps[-1].step - steps[0].step) / (began[-1] - began[0])


@torch.no_grad()
def prediction_speed(settings: DenoiserTraining, shape: tuple[int, int, int], device: torch.device) -> float:
    """Images a second of one call of 64, after one that is not counted."""
    denoiser = in_precision(untrained_denoiser(shape, 10, settings).to(device), settings.precision)
    x, where = torch.randn(64, *shape, device=device), torch.zeros(64, dtype=torch.long, device=device)
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        denoiser.eps(x, where, where).sum().item()
        took = time.perf_counter() - began
    return 64 / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured: dict[str, dict[str, list[float]]] = {}
    for repeat in range(options.repeats):
        for name, settings, shape in rows(device):
            row = measured.setdefault(name, {"training": [], "eps": []})
            row["training"].append(training_speed(settings, shape, device))
            row["eps"].append(prediction_speed(settings, shape, device))
            print(f"{repeat + 1}: {name}: {row['training'][-1]:.1f}, {row['eps'][-1]:.1f} images/s", flush=True)
    speeds = {name: {kind: statistics.median(each) for kind, each in row.items()} for name, row in measured.items()}
    report: dict[str, Any] = {
        "command": "python " + " ".join(["experiments/training.py", *sys.argv[1:]]),
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "threads": options.threads,
            "bfloat16_units": resolve_precision("auto", device) == "bfloat16",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "images_per_second": speeds,
        "repeats": measured,
        "ratios": ratios(speeds),
    }
    print(json.dumps(report["ratios"], indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def ratios(speeds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The CIFAR-10 networks against cifar10-cfg in float32, digits' against itself in float32."""
    found = {}
    for name, row in speeds.items():
        first = speeds["digits float32" if name.startswith("digits") else "cifar10-cfg float32"]
        found[name] = {kind: row[kind] / first[kind] for kind in row}
    return found


if __name__ == "__main__":
    main()
