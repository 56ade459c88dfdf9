"""params.yaml and the benchmark files, as typed objects."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from diffguard.errors import DataError, DiffGuardError, SettingError
from diffguard.settings import (
    Baseline,
    ClassifierSpec,
    Combination,
    DenoiserSpec,
    ImageFormat,
    ObjectClassifier,
    ObjectDenoiser,
    Settings,
    TrainedClassifier,
    TrainedDenoiser,
    Variant,
    parse_settings,
)
from diffguard.utils.text import read_text
from tasks.fetch import Download
from tasks.image_sources import SourceSettings

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder: params.yaml, dvc.yaml and data/ are here."""

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


class Prepare(Settings):
    seed: int


class Imported(Settings):
    """Scores made elsewhere: a Parquet file with the columns id (of the manifest) and score (higher = more OOD)."""

    file: str


class Score(Settings):
    slots: int | None = Field(default=None, ge=1)
    shard_size: int = Field(ge=1)
    samples: int = Field(ge=0)
    variants: dict[Name, Variant]
    baselines: dict[Name, Baseline]
    imported: dict[Name, Imported] = Field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all rows of the result table that are scored by themselves."""
        return [*self.variants, *self.baselines, *self.imported]

    @property
    def need_train(self) -> list[str]:
        """The rows that take something from the split train; of detectors, those that see features or pixels."""
        paths = [name for name, variant in self.variants.items() if variant.needs_train]
        return paths + [name for name, each in self.baselines.items() if each.sees in ("features", "pixels")]

    def only(self, names: Collection[str]) -> "Score":
        """With the rows of these names alone."""
        kinds = {"variants": self.variants, "baselines": self.baselines, "imported": self.imported}
        kept = {kind: {name: row for name, row in rows.items() if name in names} for kind, rows in kinds.items()}
        return self.model_copy(update=kept)

    @model_validator(mode="after")
    def _names_differ(self) -> "Score":
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"{twice[0]} names two of variants, baselines and imported")
        return self


class Calibrate(Settings):
    accept: float = Field(gt=0, lt=1)


class Evaluate(Settings):
    default: str
    draws: int = Field(ge=100)
    seed: int


class Bundle(Settings):
    """What is deployed.

    Attributes:
        detector: a row of the result table; None: `evaluate.default`.
    """

    detector: str | None = None


class Params(Settings):
    """All of params.yaml, grouped by stage.

    Attributes:
        root: what {root} stands for in the paths of a benchmark file.
        classifiers: those of the benchmark that are guarded.
        combine: combinations of rows, each of variants, baselines, imported scores and earlier combinations.
    """

    benchmark: str
    root: str | None = None
    classifiers: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    prepare: Prepare
    score: Score
    combine: dict[Name, Combination] = Field(default_factory=dict)
    calibrate: Calibrate
    evaluate: Evaluate
    bundle: Bundle = Bundle()

    @property
    def names(self) -> list[str]:
        """Of all rows of the result table: what is scored, then the combinations."""
        return [*self.score.names, *self.combine]

    @property
    def fusions(self) -> list[str]:
        """The combinations that fuse scores."""
        return [name for name, each in self.combine.items() if each.kind in ("z-sum", "fisher", "maximum")]

    def only(self, names: Collection[str]) -> "Params":
        """With the rows of these names alone, and those that the combinations among them are made of."""
        wanted = set(names)
        for name, combination in reversed(self.combine.items()):
            if name in wanted:
                wanted |= set(combination.of)
        kept = {name: each for name, each in self.combine.items() if name in wanted}
        return self.model_copy(update={"score": self.score.only(wanted), "combine": kept})

    def without(self, names: Collection[str]) -> "Params":
        """Without the rows of these names, and the combinations that they are part of."""
        gone = set(names)
        for name, combination in self.combine.items():
            if not gone.isdisjoint(combination.of):
                gone.add(name)
        kept = {name: each for name, each in self.combine.items() if name not in gone}
        score = self.score.only([name for name in self.score.names if name not in gone])
        return self.model_copy(update={"score": score, "combine": kept})

    @model_validator(mode="after")
    def _names_known(self) -> "Params":
        known = self.score.names
        for name, combination in self.combine.items():
            if name in known:
                raise ValueError(f"combine.{name}: a variant, baseline or imported row has that name")
            known_name(f"combine.{name}.of", list(combination.of), known)
            known = [*known, name]
        known_name("evaluate.default", [self.evaluate.default], known)
        if self.bundle.detector is not None:
            known_name("bundle.detector", [self.bundle.detector], known)
        return self


def code_of(variants: Iterable[Variant], baselines: Iterable[Baseline], models: Iterable[Any]) -> list[str]:
    """What these settings name as ``package.module:name``.

    Args:
        models: specs of classifiers and denoisers.
    """
    distances = [name for variant in variants for name in variant.distances if ":" in name]
    objects = [spec.object for spec in models if isinstance(spec, ObjectClassifier | ObjectDenoiser)]
    return sorted({*distances, *objects, *(baseline.detector for baseline in baselines)})


def project_code() -> list[str]:
    """The code that params.yaml and the benchmark files of this project name; they are the user's own."""
    score = load_params().score
    variants, models = list(score.variants.values()), list[Any]()
    for path in sorted((ROOT / "data" / "benchmarks").glob("*.yaml")):
        try:
            benchmark = load_benchmark(path.stem)
        except DiffGuardError:
            continue  # whoever uses it is told
        variants += benchmark.variants.values()
        models += [benchmark.denoiser, *benchmark.classifiers.values()]
    return code_of(variants, score.baselines.values(), models)


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


class _OneOfEachKey(yaml.SafeLoader):
    """YAML whose mappings have each key once; PyYAML itself takes the last of two, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for node_of_key, _ in node.value:
            if node_of_key.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(node_of_key, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node_of_key.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(read_text(path), _OneOfEachKey)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
