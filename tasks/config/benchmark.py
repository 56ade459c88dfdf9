"""A benchmark file of data/benchmarks/, as typed objects."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from diffguard.settings import (
    ClassifierSpec,
    Combination,
    DenoiserSpec,
    ImageFormat,
    Settings,
    TrainedClassifier,
    TrainedDenoiser,
    Variant,
    parse_settings,
)
from tasks.common.text import known_name, read_yaml
from tasks.config import project
from tasks.sources.settings import SourceSettings

SPLITS = ("train", "calibration", "validation", "test")
Split = Literal["train", "calibration", "validation", "test"]

DENOISER = "denoiser"
"""What the denoiser is called among the models of a benchmark."""


_NO_NAME = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]|^[. ]|[. ]$')
"""What file systems do not take in a name, and what would lead out of a folder."""


def _check_name(name: str) -> str:
    if not 0 < len(name) <= 80 or _NO_NAME.search(name):
        raise ValueError(
            f'{name!r} cannot name a file; use 1 to 80 characters, none of / \\ : * ? " < > | and no dot or space at '
            "either end"
        )
    return name


Name = Annotated[str, AfterValidator(_check_name)]
"""Of a dataset, a classifier or a row: what files and folders are named by."""


class Download(Settings):
    """A file with a direct address; it comes to data/<benchmark>/downloads/<its name in `downloads`>/.

    Attributes:
        sha256: of the file, in hexadecimal.
        unpack: what it is unpacked as; none: the file stays as it is.
    """

    url: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    unpack: Literal["none", "tar", "zip"] = "none"


class Part(Settings):
    """Images of one source, and how many go to each split; ``rest``: all that are left."""

    source: SourceSettings
    splits: dict[Split, int | Literal["rest"]] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_rest(self) -> "Part":
        if list(self.splits.values()).count("rest") > 1:
            raise ValueError("splits: only one can have the rest")
        return self


class Dataset(Settings):
    """Images of one name; in a file a part's keys, or ``parts``, a list of them."""

    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _one_part(cls, values: Any) -> Any:
        return {"parts": [values]} if isinstance(values, dict) and "parts" not in values else values

    @property
    def splits(self) -> dict[Split, int | Literal["rest"]]:
        """How many go to each split."""
        return {split: count for part in self.parts for split, count in part.splits.items()}

    @model_validator(mode="after")
    def _each_split_once(self) -> "Dataset":
        if len(self.splits) < sum(len(part.splits) for part in self.parts):
            raise ValueError("parts: a split is in two of them")
        return self


class Benchmark(Settings):
    """InD, near- and far-OOD datasets, the classifiers under protection and the denoiser.

    Attributes:
        classes: names of the labels, in their order; a number: names are not known; the name of
            weights of torchvision: theirs; None: the class folders of the InD dataset, sorted.
        process_method: of every variant that names none; see `diffguard.settings.Variant`.
        variants: its own, beside those of params.yaml or in place of one of the same name.
        combine: its own, after those of params.yaml, of its rows and of theirs.
        detectors: names of variants, baselines and combinations, these and params.yaml's, that are a run's
            rows if none are chosen, and with a combination those that it is made of; None: all.
        default: the detector of headline figures and pictures; None: params.yaml's.
        downloads: archives that the stage `fetch` brings to data/<benchmark>/downloads/.
        duplicates: what an image does that is InD and OOD: stop the run, or be left out of the later one. One
            that comes again on the same side counts once, in one split.
    """

    name: Name
    image: ImageFormat
    classes: list[str] | int | str | None = None
    ind: dict[Name, Dataset] = Field(min_length=1, max_length=1)
    near: dict[Name, Dataset] = Field(default_factory=dict)
    far: dict[Name, Dataset] = Field(default_factory=dict)
    classifiers: dict[Name, ClassifierSpec] = Field(min_length=1)
    denoiser: DenoiserSpec
    process_method: Literal["none", "resize", "pad"] = "none"
    variants: dict[Name, Variant] = Field(default_factory=dict)
    combine: dict[Name, Combination] = Field(default_factory=dict)
    detectors: list[str] | None = None
    default: str | None = None
    downloads: dict[str, Download] = Field(default_factory=dict)
    duplicates: Literal["error", "drop"] = "error"

    @property
    def ood(self) -> dict[str, Dataset]:
        """Near and far."""
        return {**self.near, **self.far}

    @model_validator(mode="after")
    def _consistent(self) -> "Benchmark":
        if len(self.ood) < len(self.near) + len(self.far) or self.ind.keys() & self.ood.keys():
            raise ValueError("ind, near, far: a dataset's name is in two of them")
        for names in ([*self.ind, *self.ood], list(self.classifiers)):
            if alike := [each for place, each in enumerate(names) if each.lower() in map(str.lower, names[:place])]:
                raise ValueError(f"{alike[0]!r}: another name differs from it by its letters' case alone")
        for name, dataset in self.ood.items():
            if set(dataset.splits) not in ({"validation"}, {"test"}):
                raise ValueError(f"{name}: an OOD dataset belongs to one split, validation or test")
        if not any("test" in dataset.splits for dataset in self.ood.values()):
            raise ValueError("near, far: no OOD dataset has a split test")
        [ind] = self.ind.values()
        if lacking := {"calibration", "test"} - set(ind.splits):
            raise ValueError(f"ind: the split {sorted(lacking)[0]} is missing")
        models = {**{f"classifiers.{name}": each for name, each in self.classifiers.items()}, DENOISER: self.denoiser}
        for where, spec in models.items():
            if isinstance(spec, TrainedClassifier | TrainedDenoiser) and "train" not in ind.splits:
                raise ValueError(f"{where}: it is to be trained, and ind has no split train")
        if DENOISER in self.classifiers:
            raise ValueError(f"classifiers: {DENOISER} cannot be the name of one")
        return self


def load_benchmark(name: str) -> Benchmark:
    """Read data/benchmarks/<name>.yaml.

    Raises:
        SettingError: there is no such benchmark, or its file has a wrong key or value.
    """
    folder = project.ROOT / "data" / "benchmarks"
    known_name("benchmark", [name], sorted(path.stem for path in folder.glob("*.yaml")))
    return parse_settings(Benchmark, read_yaml(folder / f"{name}.yaml"), f"data/benchmarks/{name}.yaml")
