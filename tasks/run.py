"""One run: what is evaluated, whether it is params.yaml's own, and where its files are."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from diffguard.errors import SettingError
from diffguard.settings import DISTANCE_SIZES
from tasks.files import hash_file, hash_values, place, read_manifest
from tasks.settings import ROOT, Benchmark, Params, known_name, load_benchmark, load_params


@dataclass(frozen=True)
class Run:
    """Settings of one run, and its folders.

    The run that params.yaml describes writes DVC's outputs under data/<benchmark>/. Every other run
    writes under data/<benchmark>/other/, named by what made it, and reads finished work from both.

    Attributes:
        params: params.yaml, with this run's choices in place of its own.
        limit: the most images of each dataset of validation and test that are scored; None: all.
        own: whether this is params.yaml's own run.
        data: fsspec URL of what stands in place of the project's data/ for this run; see `tasks.share`.
    """

    params: Params
    benchmark: Benchmark
    limit: int | None
    own: bool
    data: str | None
    recorded_seeds: tuple[int, ...]

    @property
    def home(self) -> Path:
        """data/<benchmark>/: what DVC tracks."""
        return (ROOT / "data" if self.data is None else place(self.data)) / self.benchmark.name

    @property
    def other(self) -> Path:
        """data/<benchmark>/other/: what runs with other settings made."""
        return self.home / "other"

    @property
    def results(self) -> Path:
        """Where metrics.json, calibration.json and plots/ of this run go."""
        return self.home if self.own else self.other / "runs" / self.name

    @cached_property
    def name(self) -> str:
        """A short name for these settings."""
        return hash_values([self.params.model_dump(mode="json"), self.limit])[:12]

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """The benchmark's whole manifest."""
        return read_manifest(self.home / "manifest.parquet")

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The rows to score: calibration, and at most `limit` of each dataset of validation and test."""
        rows = self.manifest[self.manifest["split"] != "train"]
        if self.limit is not None:
            # By content hash: a random choice that stays the same, and keeps the classes mixed.
            ranked = rows.sort_values("content_hash").groupby(["dataset", "split"])["id"]
            rows = rows[(ranked.cumcount().reindex(rows.index) < self.limit) | (rows["split"] == "calibration")]
        return rows.reset_index(drop=True)

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

    def models(self, seed: int) -> Path:
        """The folder of the models of a training seed."""
        if seed in self.recorded_seeds:
            return self.home / "models" / f"seed-{seed}"
        made_by = hash_values([self.params.train.model_dump(mode="json"), hash_file(self.home / "manifest.parquet")])
        return self.other / "models" / made_by[:12] / f"seed-{seed}"


def open_run(
    benchmark: str | None = None,
    variants: list[str] | None = None,
    limit: int | None = None,
    classifier: str | None = None,
    seeds: list[int] | None = None,
    data: str | None = None,
) -> Run:
    """params.yaml with these choices; an argument that is None leaves its own setting.

    Raises:
        SettingError: a name is unknown, a number out of range, or a distance needs larger images.
    """
    own = load_params()
    if benchmark not in (None, own.benchmark):
        known_name("benchmark", [benchmark], [own.benchmark])
    if limit is not None and limit < 1:
        raise SettingError(f"limit: {limit} is not at least 1")
    params = own
    if classifier is not None:
        known_name("classifier", [classifier], own.train.classifiers)
        params = params.model_copy(update={"classifiers": [classifier]})
    if seeds is not None:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise SettingError(f"seeds: {seeds} are not different numbers from 0 up")
        params = params.model_copy(update={"seeds": seeds})
    if variants is not None:
        params = _choose(params, variants)
    chosen_benchmark = load_benchmark(own.benchmark)
    for name, variant in params.score.variants.items():
        for distance in variant.distances:
            if chosen_benchmark.image.size < DISTANCE_SIZES.get(distance, 1):
                raise SettingError(
                    f"params.yaml: score.variants.{name}: {distance} takes images from {DISTANCE_SIZES[distance]} "
                    f"pixels up; those of {chosen_benchmark.name} have {chosen_benchmark.image.size}"
                )
    return Run(
        params=params,
        benchmark=chosen_benchmark,
        limit=limit,
        own=params == own and limit is None and data is None,
        data=data,
        recorded_seeds=tuple(own.seeds),
    )


def _choose(params: Params, names: list[str]) -> Params:
    """Only the variants and baselines of these names."""
    score = params.score
    known_name("variants", names, [*score.variants, *score.baselines])
    if not names:
        raise SettingError("variants: the list is empty")
    chosen = score.model_copy(
        update={
            "variants": {name: each for name, each in score.variants.items() if name in names},
            "baselines": {name: each for name, each in score.baselines.items() if name in names},
        }
    )
    return params.model_copy(update={"score": chosen})
