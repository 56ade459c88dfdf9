"""Stage train: the classifiers under protection and the denoiser.

What a benchmark trains is trained on the train split; of what it brings from elsewhere a reference is
kept, with the hash of its weights.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffguard.classifiers import save_classifier
from diffguard.denoisers import PixelDenoiser
from diffguard.errors import SettingError
from diffguard.hashing import hash_file, hash_values
from diffguard.model_folder import CLASSIFIER_FILE, open_spec, write_reference
from diffguard.pipelines import save_denoiser
from diffguard.samples import sample_grid
from diffguard.specs import TrainedClassifier, TrainedDenoiser
from diffguard.training import Progress, train_classifier, train_denoiser
from tasks.command import run_stage
from tasks.files import read_image
from tasks.log import TrainingLog, open_training
from tasks.models import check_fits
from tasks.prepare import make_ready
from tasks.run import Run, open_run
from tasks.settings import DENOISER, known_name


def train(run: Run, model: str, seed: int, device: str | None = None, minutes: float | None = None) -> Path:
    """Train one model, or note where it comes from.

    Training of a denoiser goes on where it was, if it was interrupted, and its samples go to MLflow.

    Args:
        model: "denoiser", or a classifier's name in the benchmark.
        device: where it trains; a GPU if there is one.
        minutes: a time budget, in place of its own.

    Returns:
        The model's folder.

    Raises:
        SettingError: a time budget is given, and the model comes from elsewhere.
    """
    known_name("model", [model], [DENOISER, *run.benchmark.classifiers])
    spec = run.benchmark.denoiser if model == DENOISER else run.benchmark.classifiers[model]
    if minutes is not None:
        if not isinstance(spec, TrainedClassifier | TrainedDenoiser):
            raise SettingError(f"minutes: {model} of {run.benchmark.name} is not trained here")
        if minutes <= 0:
            raise SettingError(f"minutes: {minutes:g} is not more than 0")
        spec = spec.model_copy(update={"minutes": minutes})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = run.model(seed, model)
    with _whole_folder(folder) as made:
        if isinstance(spec, TrainedClassifier | TrainedDenoiser):
            rows = run.manifest[run.manifest["split"] == "train"]
            images, labels = _read_bytes(run, rows), torch.tensor(rows["label"].to_numpy())
            with ProgressBar(f"train {model}, seed {seed}") as progress:
                if isinstance(spec, TrainedClassifier):
                    classifier = train_classifier(images, labels, len(run.classes), spec, seed, progress, device=device)
                    save_classifier(classifier, made / CLASSIFIER_FILE)
                else:
                    denoiser = _train_denoiser(run, images, labels, spec, seed, progress, device)
                    save_denoiser(denoiser, made)
        else:
            opened = open_spec(spec, run.classes, run.benchmark.image.size)
            check_fits(run, model, opened)
            write_reference(made, spec, opened)
    return folder


def _train_denoiser(
    run: Run, images: Tensor, labels: Tensor, spec: TrainedDenoiser, seed: int, progress: Progress, device: str
) -> PixelDenoiser:
    settings = spec.model_dump(mode="json", exclude={"minutes", "checkpoint_minutes"})
    begun = hash_values([settings, seed, hash_file(run.home / "manifest.parquet")])
    checkpoint = run.other / "training" / f"{begun[:12]}.pt"
    note = checkpoint.with_suffix(".mlflow")
    with _samples_logged(run, spec, seed, note) as preview:
        denoiser = train_denoiser(
            images,
            labels,
            len(run.classes),
            spec,
            seed,
            progress,
            device=device,
            checkpoint=checkpoint,
            preview=preview,
        )
    checkpoint.unlink(missing_ok=True)
    note.unlink(missing_ok=True)
    return denoiser


@contextmanager
def _samples_logged(
    run: Run, spec: TrainedDenoiser, seed: int, note: Path
) -> Iterator[Callable[[int, PixelDenoiser], None]]:
    """A preview that logs samples of each class to MLflow. Only a long training opens a run there.

    Args:
        note: see `open_training`; a training that goes on does so in its run.
    """
    opened: list[TrainingLog | None] = []

    def preview(step: int, denoiser: PixelDenoiser) -> None:
        if not opened:
            long = step < spec.iterations or note.is_file()
            opened.append(open_training(run, spec, seed, note) if long else None)
        if opened[0] is not None:
            opened[0].picture(f"samples/{step:07d}.png", sample_grid(denoiser))

    status = "FAILED"
    try:
        yield preview
        status = "FINISHED"
    finally:
        if opened and opened[0] is not None:
            opened[0].close(status)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside it, which takes its place when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        made.chmod(0o755)
        yield made
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _read_bytes(run: Run, rows: Any) -> Tensor:
    """The images of these rows as uint8 [N, C, H, W]: a quarter of what floats take."""
    images: Tensor | None = None
    for number, (path, recorded) in enumerate(zip(rows["path"], rows["content_hash"], strict=True)):
        image = (read_image(run.home, path, recorded) * 255).round().to(torch.uint8)
        if images is None:
            images = torch.empty((len(rows), *image.shape), dtype=torch.uint8)
        images[number] = image
    if images is None:
        raise SettingError(f"data/benchmarks/{run.benchmark.name}.yaml: ind: the train split has no images")
    return images


class ProgressBar:
    """A tqdm bar as the library's progress callback."""

    def __init__(self, title: str) -> None:
        self.bar = tqdm(desc=title, unit="step", mininterval=1.0)

    def __enter__(self) -> Progress:
        def advance(done: int, total: int, loss: float) -> None:
            self.bar.total = total
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.bar.update(done - self.bar.n)

        return advance

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def command(arguments: Sequence[str] | None = None) -> int:
    """`diffguard train`, and the DVC stage; returns the exit code."""
    parser = argparse.ArgumentParser(prog="diffguard train", description=__doc__)
    parser.add_argument("model", help="denoiser, or a classifier's name in the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--benchmark", help="a file of data/benchmarks/; params.yaml's if not given")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--minutes", type=float, help="a time budget, in place of the benchmark file's")
    options = parser.parse_args(arguments)
    run = open_run(benchmark=options.benchmark, root=options.root)
    if run.recorded_seeds is None:
        make_ready(run.benchmark, run.home, run.params.prepare.seed)
    print(train(run, options.model, options.seed, minutes=options.minutes))
    return 0


if __name__ == "__main__":
    run_stage(command)
