"""One run: what is evaluated, whether it is params.yaml's own, and where its files are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffguard.errors import SettingError
from diffguard.utils.hashing import hash_unchanged, hash_values
from tasks.common.files import place, read_manifest
from tasks.common.text import known_name
from tasks.config import project
from tasks.config.benchmark import DENOISER, Benchmark, load_benchmark
from tasks.config.changes import Change, parse_change
from tasks.config.choices import (
    check_choosing,
    choose,
    of_benchmark,
    of_size,
    see_train,
    why_too_small,
    with_its_rows,
)
from tasks.config.models import with_models
from tasks.config.params import Params, code_of, load_params
from tasks.config.precision import with_precision
from tasks.config.resolve import label_names, resolved
from tasks.config.study import load_study, of_study, setup_of

Choices = dict[str, Any]
"""Keyword arguments of `open_run`."""

EVALUATION_LOCK = "evaluation.lock"
"""In a benchmark's folder other/: held by the evaluation or study that is at work there."""


@dataclass(frozen=True)
class Run:
    """Settings of one run, and its folders.

    The run that params.yaml describes writes DVC's outputs under data/<benchmark>/. Every other run
    writes under data/<benchmark>/other/, named by what made it, and reads finished work from both.

    Attributes:
        params: params.yaml, with this run's choices in place of its own.
        limit: the most images of each dataset of validation and test that are scored; None: all.
        whole: whether nothing was chosen: these are all rows, images and training seeds of the benchmark.
        own: whether this is params.yaml's own run, a whole one of its benchmark.
        data: fsspec URL of what stands in place of the project's data/ for this run; see `tasks.score.share`.
        recorded_seeds: the training seeds whose models DVC has; None: the benchmark is not DVC's.
        precision: what ``auto`` means for a variant, and stands in `params` in its place; None: no variant says it.
        specs: of the denoiser and each classifier as the benchmark's file has it, the same on every machine; in
            `benchmark` the places in them are this machine's.
        replaced: names of the models that are not as the benchmark's file has them; DVC has none of these.
        change: what is done to the InD test images, which are then all that is scored; None: nothing, and all are.
    """

    params: Params
    benchmark: Benchmark
    limit: int | None
    whole: bool
    own: bool
    data: str | None
    recorded_seeds: tuple[int, ...] | None
    precision: str | None
    specs: Mapping[str, Any]
    replaced: frozenset[str] = frozenset()
    change: Change | None = None

    @property
    def home(self) -> Path:
        """data/<benchmark>/: what DVC tracks."""
        return (project.ROOT / "data" if self.data is None else place(self.data)) / self.benchmark.name

    @property
    def other(self) -> Path:
        """data/<benchmark>/other/: what runs with other settings made."""
        return self.home / "other"

    @property
    def results(self) -> Path:
        """Where metrics.json, calibration.json and plots/ of this run go."""
        return self.home if self.own else self.other / "runs" / self.name

    @property
    def code(self) -> list[str]:
        """Code that params.yaml and the benchmark's file name: the user's own, which files made here may name."""
        score = self.params.score
        return code_of(score.variants.values(), score.baselines.values(), self.specs.values())

    @property
    def default(self) -> str:
        """The detector of headline figures and pictures; the first row of a run that leaves it out."""
        names = self.params.names
        return self.params.evaluate.default if self.params.evaluate.default in names else names[0]

    @cached_property
    def name(self) -> str:
        """A short name for these settings."""
        settings = [self.params.model_dump(mode="json"), self.benchmark.model_dump(mode="json"), self.limit]
        if self.change is not None:
            settings.append(self.change.model_dump(mode="json"))
        return hash_values(settings)[:12]

    @cached_property
    def unchanged(self) -> "Run":
        """The run with images as they are, on whose calibration images thresholds and detectors are fitted."""
        return self if self.change is None else replace(self, change=None)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the labels."""
        if self.benchmark.classes is not None or not self.manifest_file.is_file():
            return label_names(self.benchmark)
        names = self.manifest[self.manifest["role"] == "ind"].groupby("label")["class_name"].first()
        return [str(name) for name in names]

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """The benchmark's whole manifest."""
        return read_manifest(self.manifest_file)

    @property
    def manifest_file(self) -> Path:
        """The manifest's file, whether it is there or not."""
        return self.home / "manifest.parquet"

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The rows to score: calibration, and at most `limit` of each dataset of validation and test.

        Of a run with a change they are the InD test rows among these.
        """
        if self.change is not None:
            rows = self.unchanged.scored
            return rows[(rows["split"] == "test") & (rows["role"] == "ind")].reset_index(drop=True)
        rows = self.manifest[self.manifest["split"] != "train"]
        if self.limit is not None:
            # By content hash: a random choice that stays the same, and keeps the classes mixed.
            ranked = rows.sort_values("content_hash").groupby(["dataset", "split"])["id"]
            rows = rows[(ranked.cumcount().reindex(rows.index) < self.limit) | (rows["split"] == "calibration")]
        return rows.reset_index(drop=True)

    @cached_property
    def scored_hash(self) -> str:
        """A hash of the rows to score, by what scores depend on."""
        return _hash_rows(self.scored, ["id", "dataset", "split", "label", "content_hash"])

    @cached_property
    def train_hash(self) -> str:
        """A hash of the rows of the train split, by what detectors that are fitted on it depend on."""
        return _hash_rows(self.manifest[self.manifest["split"] == "train"], ["id", "label", "content_hash"])

    @cached_property
    def sample_ids(self) -> frozenset[str]:
        """Ids of the test images kept for the pictures: evenly spaced, so of every class."""
        ids: set[str] = set()
        for _, rows in self.scored[self.scored["split"] == "test"].groupby("dataset"):
            count = min(self.params.score.samples, len(rows))
            ids |= set(rows["id"].iloc[np.linspace(0, len(rows) - 1, count).round().astype(int)])
        return frozenset(ids)

    @cached_property
    def shards(self) -> int:
        """How many shards the scored rows make."""
        return -(-len(self.scored) // self.params.score.shard_size)

    def rows_of(self, shard: int) -> int:
        """How many rows a shard has."""
        size = self.params.score.shard_size
        return min(size, len(self.scored) - shard * size)

    def model(self, seed: int, name: str) -> Path:
        """The folder of a model of a training seed: "denoiser", or a classifier's name."""
        if self.is_recorded(seed, name):
            return self.home / "models" / f"seed-{seed}" / name
        spec = self.specs[name].model_dump(mode="json", exclude={"license"})
        images = hash_unchanged(self.manifest_file) if self.manifest_file.is_file() else "none yet"
        root = [self.params.root] if "{root}" in str(spec) else []
        made_by = hash_values([spec, seed, images, *root])
        return self.other / "models" / f"{name}-{made_by[:12]}"

    def is_recorded(self, seed: int, name: str) -> bool:
        """Whether DVC has the model of a training seed."""
        return self.recorded_seeds is not None and seed in self.recorded_seeds and name not in self.replaced


def _hash_rows(rows: pd.DataFrame, columns: list[str]) -> str:
    return hash_values(rows[columns].values.tolist())


def open_run(
    benchmark: str | None = None,
    variants: list[str] | None = None,
    limit: int | None = None,
    classifier: str | None = None,
    seeds: list[int] | None = None,
    root: str | None = None,
    data: str | None = None,
    precision: str | None = None,
    models: dict[str, dict[str, Any]] | None = None,
    change: dict[str, Any] | None = None,
    study: str | None = None,
    point: str | None = None,
) -> Run:
    """params.yaml with these choices; an argument that is None leaves its own setting.

    A benchmark that is not params.yaml's brings its own classifiers, and its choice of variants. In a process that
    asks more than once, see `tasks.config.current.current_run`.

    Args:
        variants: names of rows: variants, baselines, imported scores and combinations. A combination brings
            along the rows that it is made of: they are scored, and then are rows of the table too.
        precision: what a variant's ``auto`` means; None: what the scores that DVC records were made in, if it is
            it is this run that made them, else what is fast on this machine.
        models: by name ("denoiser", or a classifier's), keys in place of those of the benchmark's spec; see
            `tasks.config.models.with_models`.
        change: what is done to the InD test images, which are then all that is scored; see `tasks.config.changes`.

    Raises:
        SettingError: a name or precision is unknown, a number out of range, a distance needs larger images, a
            combination that chooses a validation split, or a change changes no such image.
    """
    written = load_params()
    name = benchmark or written.benchmark
    recorded = name == written.benchmark
    if recorded and root not in (None, written.root):
        raise SettingError(f"root: DVC prepares {name}, the benchmark of params.yaml; set root there")
    if limit is not None and limit < 1:
        raise SettingError(f"limit: {limit} is not at least 1")
    written = written.model_copy(update={"root": root or written.root})
    settings = None if study is None else load_study(study)
    if settings is None and point is not None:
        raise SettingError("point: it is one of a study's; give study too")
    if settings is not None:
        setup = setup_of(settings, str(study), point)
        models = models or setup.models
        change = change or setup.change
        limit = settings.limit if limit is None else limit
    as_written, replaced = with_models(load_benchmark(name), models or {})
    chosen = resolved(as_written, written.root)
    pool = with_its_rows(written, chosen)
    own = of_benchmark(pool, chosen, recorded=recorded)
    params = own
    if settings is not None:
        params = pool = of_study(own, pool, chosen, settings, str(study), point)
    if classifier is not None:
        known_name("classifier", [classifier], chosen.classifiers)
        params = params.model_copy(update={"classifiers": [classifier]})
    if seeds is not None:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise SettingError(f"seeds: {seeds} are not different numbers from 0 up")
        params = params.model_copy(update={"seeds": seeds})
    if variants is not None:
        params = of_size(choose(params, pool, "variants", variants), chosen)
        see_train("variants", params, chosen)
    if chosen.detectors is not None or variants is not None:
        check_choosing(params, chosen)
    for each, variant in params.score.variants.items():
        if why := why_too_small(variant, chosen.image.size):
            place = "params.yaml: score.variants" if study is None else f"data/studies/{study}.yaml: variants"
            raise SettingError(f"{place}.{each}: {why}; those of {chosen.name} have {chosen.image.size}")
    whole = params == own and limit is None and data is None and study is None and not replaced
    is_own = recorded and whole
    params, precision = with_precision(params, precision, project.ROOT / "data" / name / "scores" if is_own else None)
    changed = None
    if change is not None:
        changed = parse_change(change, chosen.image)
        if params.score.imported:
            imported = next(iter(params.score.imported))
            raise SettingError(f"change: {imported} is imported: its scores are of unchanged images; choose other rows")
    return Run(
        params=params,
        benchmark=chosen,
        limit=limit,
        whole=whole and changed is None,
        own=is_own and changed is None,
        data=data,
        recorded_seeds=tuple(written.seeds) if recorded else None,
        precision=precision,
        specs={DENOISER: as_written.denoiser, **as_written.classifiers},
        replaced=replaced,
        change=changed,
    )
