"""params.yaml as typed objects."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from diffguard.errors import DiffGuardError
from diffguard.settings import (
    Baseline,
    Combination,
    ObjectClassifier,
    ObjectDenoiser,
    Settings,
    Variant,
    parse_settings,
)
from tasks.common.text import known_name, read_yaml
from tasks.config import project
from tasks.config.benchmark import Name, load_benchmark


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
        """The rows that take something from the split train."""
        from diffguard.detectors.baselines import needs_fit  # torch and pytorch_ood take seconds to import

        paths = [name for name, variant in self.variants.items() if variant.needs_train]
        return paths + [name for name, baseline in self.baselines.items() if needs_fit(baseline)]

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
        return [name for name, combination in self.combine.items() if combination.fuses]

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
    for path in sorted((project.ROOT / "data" / "benchmarks").glob("*.yaml")):
        try:
            benchmark = load_benchmark(path.stem)
        except DiffGuardError:
            continue  # whoever uses it is told
        variants += benchmark.variants.values()
        models += [benchmark.denoiser, *benchmark.classifiers.values()]
    return code_of(variants, score.baselines.values(), models)


def load_params(path: Path | None = None) -> Params:
    """Read params.yaml.

    Raises:
        DataError: it is missing or is not YAML.
        SettingError: a key is unknown or a value wrong; the message names it.
    """
    path = path or project.ROOT / "params.yaml"
    return parse_settings(Params, read_yaml(path), path.name)
