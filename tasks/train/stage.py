"""Stage train: the classifiers under protection and the denoiser.

What a benchmark trains is trained on the train split; of what it brings from elsewhere a reference is
kept, with the hash of its weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.denoisers.base import in_precision
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.models.folder import CLASSIFIER_FILE, hash_weights, open_spec, write_reference
from diffguard.settings import TrainedClassifier, TrainedDenoiser
from diffguard.training import Progress, TrainingStep, train_classifier, train_denoiser
from diffguard.training.previews import sample_grid
from diffguard.utils.atomic import atomic_folder
from diffguard.utils.hashing import hash_file, hash_values
from diffguard.utils.precision import resolve_precision
from tasks.common.files import note_use, read_image_bytes
from tasks.common.text import known_name
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run
from tasks.models.checks import check_fits
from tasks.services.training_log import TrainingLog, open_training
from tasks.train.card import denoiser_card
from tasks.train.meter import open_meter


def train_if_missing(run: Run, model: str, seed: int) -> None:
    """Train a model that DVC does not have, unless it is there already; see `train`."""
    folder = run.model(seed, model)
    if folder.exists():
        note_use(folder)
    else:
        train(run, model, seed)


def train(
    run: Run,
    model: str,
    seed: int,
    device: str | None = None,
    minutes: float | None = None,
    start: str | None = None,
    finish: float | None = None,
) -> Path:
    """Train one model, or note where it comes from.

    A training goes on where it was, if it was interrupted, and its curves and samples go to MLflow.

    Args:
        model: "denoiser", or a classifier's name in the benchmark.
        device: where it trains; a GPU if there is one.
        minutes: a time budget, in place of its own.
        start: folder of a denoiser of the same network, whose weights it begins with.
        finish: bring a denoiser's learning rate down over so many minutes from where its training is, and end it.

    Returns:
        The model's folder.

    Raises:
        SettingError: an option is given that this model does not take.
        DataError: another process trains it.
        KeyboardInterrupt: it was interrupted, and the checkpoint is written.
    """
    known_name("model", [model], [DENOISER, *run.benchmark.classifiers])
    spec = run.benchmark.denoiser if model == DENOISER else run.benchmark.classifiers[model]
    for option, value in {"minutes": minutes, "finish": finish, "from": start}.items():
        if value is None:
            continue
        if not isinstance(spec, TrainedClassifier | TrainedDenoiser):
            raise SettingError(f"{option}: {model} of {run.benchmark.name} is not trained here")
        if option != "minutes" and not isinstance(spec, TrainedDenoiser):
            raise SettingError(f"{option}: for denoisers alone; {model} is a classifier")
        if isinstance(value, float) and value <= 0:
            raise SettingError(f"{option}: {value:g} is not more than 0")
    if minutes is not None:
        spec = spec.model_copy(update={"minutes": minutes})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = run.model(seed, model)
    with atomic_folder(folder) as new:
        if isinstance(spec, TrainedClassifier | TrainedDenoiser):
            _train_here(run, model, spec, seed, device, new, start, finish)
        else:
            opened = open_spec(spec, run.classes, run.benchmark.image.size)
            check_fits(run, model, opened)
            write_reference(new, spec, opened)
    return folder


def _train_here(
    run: Run,
    model: str,
    spec: TrainedClassifier | TrainedDenoiser,
    seed: int,
    device: str,
    made: Path,
    start: str | None,
    finish: float | None,
) -> None:
    """Train a model on the train split, and write it into the folder `made`."""
    opened = None if start is None else load_denoiser(start)
    rows = run.manifest[run.manifest["split"] == "train"]
    begun = hash_values([model, spec.identity(), seed, hash_file(run.home / "manifest.parquet"), start])
    checkpoint = run.other / "training" / f"{begun[:12]}.pt"
    note = checkpoint.with_suffix(".mlflow")
    with _alone(checkpoint), ProgressBar(f"train {model}, seed {seed}") as bar:
        if start is not None and not checkpoint.is_file():
            print(f"begins with the weights of {start}")
        if rows.empty:
            raise SettingError(f"data/benchmarks/{run.benchmark.name}.yaml: ind: the train split has no images")
        images, labels = read_image_bytes(run.home, rows), torch.tensor(rows["label"].to_numpy())
        classes = len(run.classes)
        with _logged(run, model, spec, seed, note) as log:

            def progress(step: TrainingStep) -> None:
                bar(step)
                if log is not None:
                    log.step(step)

            if isinstance(spec, TrainedClassifier):
                classifier = train_classifier(
                    images, labels, classes, spec, seed, progress, device=device, checkpoint=checkpoint
                )
                save_classifier(classifier, made / CLASSIFIER_FILE)
            else:
                meter, measured, steps = open_meter(run, seed), dict[str, float](), 0

                def preview(step: int, denoiser: PixelDenoiser) -> None:
                    nonlocal steps
                    steps = step
                    shown = in_precision(denoiser.to(device), resolve_precision(spec.precision, device))
                    measured.update({} if meter is None else meter.measure(shown))
                    if log is not None:
                        log.picture(f"samples/{step:07d}.png", sample_grid(shown))
                        for name, value in measured.items():
                            log.value(step, name, value)

                denoiser = train_denoiser(
                    images,
                    labels,
                    classes,
                    spec,
                    seed,
                    progress,
                    device=device,
                    checkpoint=checkpoint,
                    preview=preview,
                    start=opened,
                    finish_minutes=finish,
                )
                if spec.stored == "float16":
                    denoiser.unet.half().float()
                    if not all(weight.isfinite().all() for weight in denoiser.unet.parameters()):
                        raise SettingError("denoiser: stored: float16 does not hold its weights; leave it at float32")
                began_with = None if opened is None else hash_weights(opened)
                denoiser.card = denoiser_card(run, spec, seed, denoiser, rows, steps, began_with, measured)
                save_denoiser(denoiser, made)
                if meter is not None:
                    print(meter)
        if spec.rate_schedule == "one-cycle":  # otherwise it can be extended from there
            checkpoint.unlink(missing_ok=True)
            note.unlink(missing_ok=True)


@contextmanager
def _alone(checkpoint: Path) -> Iterator[None]:
    """No other process goes on with this training.

    Raises:
        DataError: one does.
    """
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(checkpoint.with_suffix(".lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"{checkpoint}: another process is at this training; wait for it, or end it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _logged(
    run: Run, model: str, spec: TrainedClassifier | TrainedDenoiser, seed: int, note: Path
) -> Iterator[TrainingLog | None]:
    """Its run in MLflow; None if that does not answer.

    Args:
        note: see `open_training`; a training that goes on does so in its run.
    """
    log, status = open_training(run, model, spec, seed, note), "FAILED"
    try:
        yield log
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if log is not None:
            log.close(status)


class ProgressBar:
    """A tqdm bar as the library's progress callback."""

    def __init__(self, title: str) -> None:
        self.bar = tqdm(desc=title, unit="step", mininterval=1.0)

    def __enter__(self) -> Progress:
        def advance(step: TrainingStep) -> None:
            self.bar.total = step.steps
            self.bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            self.bar.update(step.step - self.bar.n)

        return advance

    def __exit__(self, *_: object) -> None:
        self.bar.close()
