"""What a run needs scored, and the folders where it is or will be."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from diffguard.models.folder import hash_model
from diffguard.settings import Baseline, Variant
from diffguard.utils.hashing import file_state, hash_code, hash_unchanged, hash_values
from diffguard.version import METHOD_VERSION
from tasks.common.files import is_local
from tasks.config import project
from tasks.config.benchmark import DENOISER
from tasks.config.params import Imported
from tasks.config.run import Run
from tasks.score.store import SCHEMA_VERSION, ScoreFolder, Store
from tasks.sources.settings import place_of


@dataclass(frozen=True)
class Item:
    """One row of the result table at one training seed, and the folder of its scores."""

    seed: int
    classifier: str
    name: str
    settings: Variant | Baseline | Imported
    folder: ScoreFolder
    roles: Mapping[str, str]

    @property
    def title(self) -> str:
        """For messages: which scores these are."""
        return f"scores of {self.name} ({self.classifier}, seed {self.seed})"

    def read(self) -> pd.DataFrame:
        """All rows, each with its dataset's role and the item's name, which change no score.

        Raises:
            DataError: see `ScoreFolder.read`.
        """
        table = self.folder.read()
        return table.assign(role=table["dataset"].map(self.roles), variant=self.name)


Tables = dict[tuple[str, str, int], pd.DataFrame]
"""Score tables by classifier, row and training seed; see `Item.read`."""

_read: tuple[Hashable, Tables] | None = None


def open_store(run: Run) -> Store:
    """The store that a run reads and writes."""
    return Store(run.home / "scores", run.other / "scores", run.other / "locks", own=run.own)


def plan(run: Run) -> list[Item]:
    """Everything that a run needs scored, with the folders where it is or will be.

    What is read for it is read once a process, until it changes: the rows' hashes stay with the run, and those of
    models and imported scores are kept, see `diffguard.utils.hashing.hash_unchanged`. The folders are looked up anew,
    since finished scores come and go: by this run, by others, by DVC.
    """
    store = open_store(run)
    images, train = run.scored_hash, run.train_hash
    roles = dict(zip(run.scored["dataset"], run.scored["role"], strict=True))
    score = run.params.score
    common = {
        "schema_version": SCHEMA_VERSION,
        "method_version": METHOD_VERSION,
        "images": images,
        "shard_size": score.shard_size,
    }
    if run.change is not None:
        # What is fitted on calibration images is so on those of the unchanged run.
        common |= {"change": run.change.model_dump(mode="json"), "unchanged": run.unchanged.scored_hash}
    items = []
    for seed in run.params.seeds:
        denoiser = hash_model(run.model(seed, DENOISER), run.code)
        for classifier in run.params.classifiers:
            common["classifier"] = hash_model(run.model(seed, classifier), run.code)
            for name, variant in score.variants.items():
                made_by = {
                    **common,
                    "denoiser": denoiser,
                    "samples": score.samples,
                    "variant": variant.model_dump(mode="json"),
                    "code": _hash_code(variant.distances),
                    **({"train_images": train} if variant.needs_train else {}),
                }
                items.append(Item(seed, classifier, name, variant, store.open(made_by, run.shards), roles))
            for name, baseline in score.baselines.items():
                made_by = {
                    **common,
                    "train_images": train,
                    "baseline": baseline.model_dump(mode="json"),
                    "code": _hash_code([baseline.detector]),
                }
                items.append(Item(seed, classifier, name, baseline, store.open(made_by, run.shards), roles))
            for name, imported in score.imported.items():
                made_by = {**common, "imported": hash_unchanged(file_of(run, imported))}
                items.append(Item(seed, classifier, name, imported, store.open(made_by, run.shards), roles))
    return items


def read_items(items: list[Item]) -> Tables:
    """The score tables of all items.

    A process keeps the last ones, by the state of each folder (`diffguard.utils.hashing.file_state`): validate,
    calibrate, evaluate, bundle and log take the same, and nobody may write into them.

    Raises:
        DataError: see `ScoreFolder.read`.
    """
    global _read
    if not all(is_local(item.folder.path) for item in items):
        return _read_all(items)
    made_of = tuple(
        (item.classifier, item.name, item.seed, item.folder.path, file_state(item.folder.path), *item.roles.items())
        for item in items
    )
    kept = _read
    if kept is None or kept[0] != made_of:
        kept = made_of, _read_all(items)
        _read = kept
    return dict(kept[1])


def _read_all(items: list[Item]) -> Tables:
    return {(item.classifier, item.name, item.seed): item.read() for item in items}


def missing(run: Run, items: list[Item]) -> list[int]:
    """The shards that lack the scores of any item."""
    return sorted({shard for item in items for shard in item.folder.missing()})


def file_of(run: Run, imported: Imported) -> Path:
    """Where scores made elsewhere are; a relative place is in the project. Of a shared run they were copied along."""
    if run.data is not None:
        return run.home / "imported" / f"{hash_values(imported.file)[:12]}.parquet"
    return project.ROOT / place_of(imported.file, run.params.root)


def _hash_code(names: Sequence[str]) -> dict[str, str]:
    """Of what comes by ``package.module:name``."""
    return {name: hash_code(name) for name in names if ":" in name}
