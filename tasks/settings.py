"""params.yaml and the benchmark files, as typed objects."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from diffguard.errors import DataError, SettingError
from diffguard.settings import ClassifierTraining, DenoiserTraining, Settings, Variant, parse_settings

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder: params.yaml, dvc.yaml and data/ are here."""

SPLITS = ("train", "calibration", "validation", "test")
Split = Literal["train", "calibration", "validation", "test"]


class Dataset(Settings):
    """Where the images of one dataset come from, and how many go to each split."""

    source: Literal["digits", "glyphs", "letters", "patches", "noise"]
    arguments: dict[str, Any] = Field(default_factory=dict)
    splits: dict[Split, int] = Field(min_length=1)


class ImageFormat(Settings):
    """Side in pixels and Pillow mode of every stored image."""

    size: int = Field(ge=1)
    mode: Literal["L", "RGB"]


class Benchmark(Settings):
    """InD, near- and far-OOD datasets."""

    name: str
    image: ImageFormat
    classes: list[str]
    ind: dict[str, Dataset] = Field(min_length=1, max_length=1)
    near: dict[str, Dataset]
    far: dict[str, Dataset]

    @model_validator(mode="after")
    def _splits_kept_apart(self) -> "Benchmark":
        for name, dataset in {**self.near, **self.far}.items():
            if set(dataset.splits) not in ({"validation"}, {"test"}):
                raise ValueError(f"{name}: an OOD dataset belongs to one split, validation or test")
        return self


class Prepare(Settings):
    seed: int


class Train(Settings):
    classifiers: dict[str, ClassifierTraining]
    denoiser: DenoiserTraining


class Baseline(Settings):
    """A pytorch-ood detector as ``package.module:name`` and what it is given."""

    detector: str
    sees: Literal["logits", "features", "pixels"]
    arguments: dict[str, Any] = Field(default_factory=dict)


class Score(Settings):
    slots: int | None = Field(default=None, ge=1)
    shard_size: int = Field(ge=1)
    samples: int = Field(ge=0)
    variants: dict[str, Variant]
    baselines: dict[str, Baseline]

    @model_validator(mode="after")
    def _names_differ(self) -> "Score":
        if twice := sorted(self.variants.keys() & self.baselines.keys()):
            raise ValueError(f"{twice[0]} names a variant and a baseline")
        return self


class Calibrate(Settings):
    accept: float = Field(gt=0, lt=1)


class Evaluate(Settings):
    default: str
    draws: int = Field(ge=100)
    seed: int


class Params(Settings):
    """All of params.yaml, grouped by stage."""

    benchmark: str
    classifiers: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    prepare: Prepare
    train: Train
    score: Score
    calibrate: Calibrate
    evaluate: Evaluate

    @model_validator(mode="after")
    def _names_known(self) -> "Params":
        known_name("classifiers", self.classifiers, self.train.classifiers)
        known_name("evaluate.default", [self.evaluate.default], [*self.score.variants, *self.score.baselines])
        return self


def known_name(option: str, names: list[str], known: Any) -> None:
    """Raise a SettingError (a ValueError to pydantic's validators) if a name is not among the known."""
    for name in names:
        if name not in known:
            raise UnknownNameError(f"{option}: {name!r} is not one of {', '.join(known)}")


class UnknownNameError(SettingError, ValueError):
    """A setting names something that does not exist."""


def load_params(path: Path | None = None) -> Params:
    """Read params.yaml.

    Raises:
        DataError: it is missing or is not YAML.
        SettingError: a key is unknown or a value wrong; the message names it.
    """
    path = path or ROOT / "params.yaml"
    return parse_settings(Params, _read_yaml(path), path.name)


def load_benchmark(name: str) -> Benchmark:
    """Read data/benchmarks/<name>.yaml.

    Raises:
        SettingError: there is no such benchmark, or its file has a wrong key or value.
    """
    folder = ROOT / "data" / "benchmarks"
    known_name("benchmark", [name], sorted(path.stem for path in folder.glob("*.yaml")))
    return parse_settings(Benchmark, _read_yaml(folder / f"{name}.yaml"), f"data/benchmarks/{name}.yaml")


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
