"""How the label is best asked for: which noise levels, how many draws, one label against none or against all.

    python experiments/label_rows.py --root ~/images [--denoiser FOLDER] [--benchmark cifar10-jpeg] [--output FILE]

On the validation images that the meter of trainings looks at. Every row is a variant of the two distances of single
denoising steps, and what they share is evaluated once.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from processor import machine

from diffguard.engine import network_evaluations
from diffguard.errors import SettingError
from diffguard.models.denoisers.loading import load_denoiser
from diffguard.settings import AllLabels, DenoisingErrors, LabelGuidance, Variant
from tasks.common.console import run_stage
from tasks.common.files import write_json
from tasks.config.benchmark import DENOISER
from tasks.config.run import open_run
from tasks.models.checks import check_fits, open_model
from tasks.prepare.stage import make_ready
from tasks.train.meter import open_meter

LEVELS, DRAWS = 7, (1, 2, 4)
EVEN = (1.0,) * LEVELS


def gain(weights: Sequence[float] = EVEN, draws: int = 1) -> Variant:
    """The label against none."""
    errors = DenoisingErrors(weights=tuple(weights), draws=draws)
    return Variant(stop=len(weights), guidance=LabelGuidance(kind="label"), distance="label-gain", errors=errors)


def posterior(weights: Sequence[float] = EVEN) -> Variant:
    """The label against all others."""
    errors, guidance = DenoisingErrors(weights=tuple(weights)), AllLabels(kind="all-labels")
    return Variant(stop=len(weights), guidance=guidance, distance="denoiser-posterior", errors=errors)


def levels(first: int, last: int = LEVELS) -> list[float]:
    """Weights of these noise levels alone, both included."""
    return [float(level >= first) for level in range(1, last + 1)]


ROWS = {
    **{f"gain, level {level}": gain(levels(level, level)) for level in range(1, LEVELS + 3)},
    **{f"gain, levels 1 to {LEVELS}, draws: {draws}": gain(draws=draws) for draws in DRAWS},
    **{f"gain, levels {first} to {LEVELS}, draws: {DRAWS[-1]}": gain(levels(first), DRAWS[-1]) for first in (3, 5)},
    **{f"posterior, level {level}": posterior(levels(level, level)) for level in range(1, LEVELS + 1, 2)},
    **{f"posterior, levels {first} to {LEVELS}": posterior(levels(first)) for first in (1, 3)},
}
"""By name; levels of ten."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="cifar10-jpeg")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--denoiser", help="a folder; the benchmark's own if it is not given")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = open_run(benchmark=options.benchmark, root=options.root)
    make_ready(run.benchmark, run.home, run.params.prepare.seed)
    meter = open_meter(run, 0)
    if meter is None or meter.classifier is None or not len(meter.near):
        raise SettingError(
            f"{run.benchmark.name}: validation images, InD and near, and a trained classifier are needed"
        )
    denoiser = load_denoiser(options.denoiser) if options.denoiser else open_model(run, run.model(0, DENOISER))
    check_fits(run, DENOISER, denoiser)
    began = time.monotonic()
    aurocs = replace(meter, rows=ROWS).near_aurocs(denoiser)
    labels = (denoiser.num_labels, denoiser.null_label is not None)
    report: dict[str, Any] = {
        "machine": machine(),
        "ind": len(meter.images),
        "near": len(meter.near),
        "seconds": time.monotonic() - began,
        "rows": {},
    }
    for name, variant in ROWS.items():
        evaluations = network_evaluations(variant, variant.max_level, len(denoiser.alphas_cumprod), *labels)
        report["rows"][name] = {"near_auroc": aurocs[name], "evaluations": evaluations}
        print(name, report["rows"][name], flush=True)
    if options.output is not None:
        write_json(options.output, report)


if __name__ == "__main__":
    run_stage(main)
