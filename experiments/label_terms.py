"""What makes a denoiser depend on its label: terms of the loss, tried one at a time from the same weights.

    python experiments/label_terms.py --from FOLDER --root ~/images [--benchmark cifar10-jpeg] [--images 50000]
                                      [--terms none contrastive wrong_label min_snr] [--output FILE]

Each training begins with the weights of FOLDER, sees the same images in the same order with the same noise, and brings
its learning rate down over the last fifth. `aligned` draws the middle block's features together and apart as those of
the first guarded classifier are, which must be trained (the manifold loss of arXiv 2503.18414). What counts is the
meter on validation images: the denoiser's accuracy as a classifier and the near AUROC of its rows, not the loss, which
the terms change. `seconds` is one thread's.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from processor import machine
from torch import Tensor

from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.loading import load_denoiser
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import TrainedDenoiser
from diffguard.training import Term, TrainingStep, train_denoiser
from tasks.common.console import run_stage
from tasks.common.files import read_image_bytes, read_json, write_json
from tasks.common.text import known_name
from tasks.config.run import open_run
from tasks.prepare.stage import make_ready
from tasks.train.meter import open_meter

TERMS: dict[str, dict[str, Any]] = {
    "start": {},
    "none": {},
    "contrastive": {"contrastive": 0.05},
    "wrong_label": {"wrong_label": 0.003},
    "min_snr": {"min_snr": 5.0},
    "aligned": {},
}
"""By name, the settings that differ; `start` is not trained at all."""

WITHOUT: dict[str, Any] = dict.fromkeys(("contrastive", "wrong_label", "min_snr"))
"""So that a term which the benchmark's file has already is tried against none as well."""

ALIGNED = 0.1
"""Weight of the term of `aligned`."""


def aligned(classifier: Classifier) -> Term:
    """The mean squared difference of the cosine similarities of a batch's images, in the denoiser's middle block and in
    the classifier's features, both centred; times `ALIGNED`."""

    def term(denoiser: PixelDenoiser) -> Callable[[Tensor], Tensor]:
        seen: dict[str, Tensor] = {}
        denoiser.unet.mid_block.register_forward_hook(lambda _, __, maps: seen.update(maps=maps))

        def loss(images: Tensor) -> Tensor:
            with torch.no_grad():
                target = _similarities(classifier.features(images))
            return ALIGNED * (_similarities(seen["maps"].mean(dim=(2, 3))) - target).square().mean()

        return loss

    return term


def _similarities(features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        centred = F.normalize(features.float() - features.float().mean(dim=0), dim=1)
        return centred @ centred.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="cifar10-jpeg")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--from", dest="start", required=True, help="folder of the denoiser that all begin with")
    parser.add_argument("--images", type=int, default=50_000, help="that each training sees")
    parser.add_argument("--terms", nargs="+", default=list(TERMS), help=f"of {', '.join(TERMS)}")
    parser.add_argument("--output", type=Path, help="JSON; what is in it already is kept")
    options = parser.parse_args()
    known_name("--terms", options.terms, TERMS)
    run = open_run(benchmark=options.benchmark, root=options.root)
    spec = run.benchmark.denoiser
    if not isinstance(spec, TrainedDenoiser):
        raise SettingError(f"--benchmark: the denoiser of {run.benchmark.name} is not trained here")
    make_ready(run.benchmark, run.home, run.params.prepare.seed)
    meter = open_meter(run, 0)
    if meter is None:
        raise SettingError(f"{run.benchmark.name}: it has no InD validation images to measure on")
    if "aligned" in options.terms and meter.classifier is None:
        raise SettingError("--terms: aligned needs a trained classifier: run diffguard train, or leave it out")
    rows = run.manifest[run.manifest["split"] == "train"]
    images, labels = read_image_bytes(run.home, rows), torch.tensor(rows["label"].to_numpy())
    is_there = options.output is not None and options.output.is_file()
    report = read_json(options.output, "") if is_there else {"machine": machine(), "terms": {}}
    for name in options.terms:
        began, steps = time.monotonic(), list[TrainingStep]()
        if name == "start":
            denoiser = load_denoiser(options.start)
        else:
            length = {"iterations": options.images // spec.batch_size, "minutes": None, "warmup_steps": 1}
            settings = spec.model_copy(update={**length, **WITHOUT, **TERMS[name]})
            start = load_denoiser(options.start)
            term = aligned(meter.classifier) if name == "aligned" and meter.classifier is not None else None
            classes = len(run.classes)
            denoiser = train_denoiser(images, labels, classes, settings, 0, steps.append, start=start, term=term)
            denoiser.unet.mid_block._forward_hooks.clear()
        seconds = time.monotonic() - began
        measured = meter.measure(denoiser, with_rows=True)
        report["terms"][name] = {
            "settings": TERMS[name],
            "images": len(steps) * spec.batch_size,
            "seconds": seconds,
            "validation": {curve.removeprefix("validation/"): value for curve, value in measured.items()},
        }
        print(name, report["terms"][name], flush=True)
        if options.output is not None:
            write_json(options.output, report)


if __name__ == "__main__":
    run_stage(main)
