"""diffguard doctor: what is wrong with a benchmark, and what its run will cost, before hours are spent on it."""

import argparse
import os
import resource
import shutil
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from diffguard.errors import DataError
from diffguard.images import to_tensor
from diffguard.models.denoisers.base import networks_of
from diffguard.settings import TrainedClassifier, TrainedDenoiser
from tasks.config.benchmark import DENOISER, SPLITS
from tasks.config.run import Run, open_run
from tasks.doctor.cost import busy_cores, estimate_cost
from tasks.doctor.images import check_images, image_count
from tasks.doctor.report import Report
from tasks.models.checks import check_label_order, check_models, some_ind_images

_SPARE, _ROW = 64 * 2**20, 200
"""Bytes: of small files of a run, and of an image's row in a table of scores."""


def examine(run: Run, price: float | None = None) -> int:
    """Print what a run needs and what is wrong with it.

    Args:
        price: of an hour of this machine.

    Returns:
        How many problems there are.
    """
    report = Report()
    params, benchmark = run.params, run.benchmark
    with report.check("settings") as ok:
        others = len(params.score.names) - len(params.score.variants)
        rows = f"{len(params.score.variants)} variants, {others} others, {len(params.combine)} combinations"
        ok(f"data/benchmarks/{benchmark.name}.yaml: {len(params.classifiers)} classifiers, {rows}")
    manifest = check_images(report, run)
    models: dict[str, Any] = {}
    with report.check("models") as ok:
        models = check_models(run)
        for name, model in models.items():
            ok(f"{name}: {_described(run, name, model)}")
    if manifest is not None and models:
        _check_labels(report, run, manifest, models)
    if manifest is not None and models:
        busy = busy_cores()
        with report.check("one image") as ok:
            estimate_cost(ok, run, manifest, models, price)
        if busy:
            text = f"other programs take {busy:.1f} of this machine's {os.cpu_count()} cores, which these times include"
            report.line("warn", "one image", text)
    _check_room(report, run, manifest, models)
    return report.problems


def _check_labels(report: Report, run: Run, manifest: pd.DataFrame, models: dict[str, Any]) -> None:
    """Check that each classifier's labels are in the order of the benchmark's classes."""
    if "image" in manifest:
        rows = manifest[manifest["role"] == "ind"]
        labels = rows["label"].tolist()
        images = torch.stack([to_tensor(picture) for picture in rows["image"]])
    else:
        images, labels = some_ind_images(run)
    for name in run.params.classifiers:
        with report.check("labels"):
            if warning := check_label_order(run, name, models[name], images, labels):
                report.line("warn", "labels", warning)


def _described(run: Run, name: str, model: Any) -> str:
    spec = run.benchmark.denoiser if name == DENOISER else run.benchmark.classifiers[name]
    networks = [model] if isinstance(model, torch.nn.Module) else list(networks_of(model).values())
    size = sum(weights.numel() for network in networks for weights in network.parameters()) / 1e6
    what = f"{type(getattr(model, 'network', model)).__name__}, {size:.1f} M parameters"
    if isinstance(spec, TrainedClassifier | TrainedDenoiser) and not run.model(run.params.seeds[0], name).exists():
        return f"{what}, to be trained"
    return what


def _check_room(report: Report, run: Run, manifest: pd.DataFrame | None, models: dict[str, Any]) -> None:
    """Report the memory that this check took, and check that the run fits on the disk."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{peak:.1f} GiB of {total:.0f} GiB were taken here"
    if torch.cuda.is_available():
        used, capacity = (
            torch.cuda.max_memory_allocated() / 2**30,
            torch.cuda.get_device_properties(0).total_memory / 2**30,
        )
        text += f"; {used:.1f} GiB of the GPU's {capacity:.0f} GiB"
    if manifest is not None and any(
        isinstance(spec, TrainedClassifier | TrainedDenoiser)
        for spec in (run.benchmark.denoiser, *run.benchmark.classifiers.values())
    ):
        image = run.benchmark.image
        held = image_count(run, {"train"}) * image.size**2 * (3 if image.mode == "RGB" else 1) / 2**30
        text += f"; training holds {held:.2f} GiB of images"
    report.line("ok", "memory", text)
    folder = next(path for path in (run.home, *run.home.parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free / 2**30, _disk_needed(run, manifest, models) / 2**30
    with report.check("disk") as ok:
        space = f"{free:.1f} GiB are free, and the run takes about {needed:.1f}"
        if free < needed:
            raise DataError(f"{folder}: {space}; make room")
        ok(space)


def _disk_needed(run: Run, manifest: pd.DataFrame | None, models: dict[str, Any]) -> float:
    """Bytes that a run will write at most, roughly: images, models with a checkpoint of their training, scores."""
    image = run.benchmark.image
    needed = float(_SPARE)
    if manifest is not None:
        is_prepared_already = "image" not in manifest
        images = 0 if is_prepared_already else image_count(run, set(SPLITS))
        rows = image_count(run, {"calibration", "validation", "test"}) * len(run.params.classifiers)
        # Both DVC's cache and MLflow keep what is scored.
        needed += images * image.size**2 * image.channels + 2 * _ROW * rows * len(run.params.names)
    for name, model in models.items():
        networks = [model] if isinstance(model, torch.nn.Module) else list(networks_of(model).values())
        if not run.model(run.params.seeds[0], name).exists():
            # A training keeps weights, their averages and two moments beside the model itself.
            needed += 5 * 4 * sum(weights.numel() for network in networks for weights in network.parameters())
    return needed * len(run.params.seeds)


def command(arguments: Sequence[str]) -> int:
    """`diffguard doctor`; returns the exit code: 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="diffguard doctor", description=__doc__)
    parser.add_argument("--benchmark", help="a file of data/benchmarks/; params.yaml's if not given")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--limit", type=int, help="the most images of each dataset of validation and test")
    parser.add_argument("--price", type=float, help="of an hour of this machine, to tell what the run costs")
    options = parser.parse_args(arguments)
    problems = examine(open_run(benchmark=options.benchmark, root=options.root, limit=options.limit), options.price)
    print(f"\n{problems} problem{'s' if problems != 1 else ''} found" if problems else "\nnothing is wrong")
    return 1 if problems else 0
