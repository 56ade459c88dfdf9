"""Stage train: the classifiers under protection, and the denoiser, on the train split."""

import argparse
import shutil
from pathlib import Path

from tqdm import tqdm

from diffguard.errors import SettingError
from diffguard.training import Progress, train_classifier, train_denoiser
from tasks.command import run_stage
from tasks.files import read_images, write_whole
from tasks.run import Run, open_run

DENOISER = "denoiser"


def train(run: Run, model: str, seed: int) -> Path:
    """Train one model, unless it is there already from a run with other settings than params.yaml's.

    Args:
        model: "denoiser", or a classifier's name in params.yaml.

    Returns:
        The file or folder of the model.
    """
    from diffguard.classifiers import save_classifier
    from diffguard.denoisers import save_denoiser

    rows = run.manifest[run.manifest["split"] == "train"]
    images, labels = read_images(run.home, rows), _labels(rows["label"])
    classes, folder = len(run.benchmark.classes), run.models(seed)
    if model == DENOISER:
        with ProgressBar(f"train {model}, seed {seed}") as progress:
            denoiser = train_denoiser(images, labels, classes, run.params.train.denoiser, seed, progress)
        shutil.rmtree(folder / model, ignore_errors=True)
        save_denoiser(denoiser, folder / model)
        return folder / model
    if model not in run.params.train.classifiers:
        raise SettingError(f"model: {model!r} is not {DENOISER} or one of {', '.join(run.params.train.classifiers)}")
    with ProgressBar(f"train {model}, seed {seed}") as progress:
        settings = run.params.train.classifiers[model]
        classifier = train_classifier(images, labels, classes, settings, seed, progress)
    path = model_path(folder, model)
    write_whole(path, lambda target: save_classifier(classifier, target))
    return path


def model_path(folder: Path, model: str) -> Path:
    """Where a model of a seed's folder is."""
    return folder / (model if model == DENOISER else f"{model}.safetensors")


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


def _labels(values: object) -> object:
    import torch

    return torch.tensor(values.to_numpy())  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="denoiser, or a classifier's name in params.yaml")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    train(open_run(), arguments.model, arguments.seed)


if __name__ == "__main__":
    run_stage(main)
