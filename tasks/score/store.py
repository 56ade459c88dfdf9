"""The store of score folders: scores named by the hash of what made them, in shards.

A shard is there whole or not at all, so a killed run goes on where it was; other settings have
another folder, so scores never mix; a lock keeps two runs off the same shard.
"""

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from diffguard.errors import DataError
from diffguard.utils.hashing import hash_values
from tasks.common.files import is_local, note_use, write_json, write_whole

SCHEMA_VERSION = 2
"""Raised whenever the columns of a score shard change."""


@dataclass(frozen=True)
class Samples:
    """Images kept for the pictures: uint8 [N, C, H, W], with the rows' ids."""

    ids: list[str]
    input: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]
    unconditional: NDArray[np.uint8]


@dataclass(frozen=True)
class ScoreFolder:
    """Scores of one variant or baseline under one pair of models, in `shards` shards."""

    path: Path
    made_by: dict[str, Any]
    shards: int

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        there = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        return [shard for shard in range(self.shards) if self._table(shard).name not in there]

    def has(self, shard: int) -> bool:
        """Whether a shard is there."""
        return self._table(shard).is_file()

    def write(self, shard: int, table: pd.DataFrame, samples: Samples | None, seconds: float) -> None:
        """Write one shard; it counts as there from the moment its table is in place."""
        if samples is not None:
            write_whole(self._samples(shard), lambda target: _save_samples(target, samples))
        note = {"diffguard": json.dumps({"made_by": self.made_by, "seconds": seconds})}
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **note})
        write_whole(self._table(shard), lambda target: pq.write_table(arrow, target))

    def remove_partial(self, shard: int) -> None:
        """Remove what a killed run has half written of a shard; whoever calls has the shard's lock."""
        for path in self.path.glob(f".{self._table(shard).stem}.*"):
            path.unlink(missing_ok=True)

    def read(self) -> pd.DataFrame:
        """All rows.

        Raises:
            DataError: a shard is missing, damaged, or was made by something else.
        """
        if missing := self.missing():
            raise DataError(f"{self.path}: shard {missing[0]} of {self.shards} is missing; run: dvc repro score")
        tables = []
        for shard in range(self.shards):
            arrow, note = self._open(shard)
            if note.get("made_by") != self.made_by:
                raise DataError(f"{self._table(shard)}: made by other settings than its folder's; delete the folder")
            tables.append(arrow.to_pandas())
        return pd.concat(tables, ignore_index=True)

    def seconds(self) -> float:
        """Time that scoring took, in seconds; variants scored in one pass share its time."""
        return sum(float(self._open(shard)[1]["seconds"]) for shard in range(self.shards))

    def samples(self) -> Samples | None:
        """The images kept for the pictures; None for a detector that reconstructs nothing."""
        parts = [_load_samples(path) for path in map(self._samples, range(self.shards)) if path.is_file()]
        if not parts:
            return None
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return Samples(ids=joined.pop("ids").tolist(), **joined)

    def _open(self, shard: int) -> tuple[pa.Table, dict[str, Any]]:
        try:
            with self._table(shard).open("rb") as file:
                arrow = pq.read_table(file)
            return arrow, json.loads((arrow.schema.metadata or {})[b"diffguard"])
        except (OSError, KeyError, ValueError) as error:
            message = f"{self._table(shard)}: not a score shard ({error}); delete it and run: dvc repro score"
            raise DataError(message) from None

    def _table(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.parquet"

    def _samples(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.npz"


@dataclass(frozen=True)
class Store:
    """Where score folders are: DVC's own, and those of runs with other settings.

    Attributes:
        tracked: DVC's output; only params.yaml's own run writes here.
        other: everything else.
        locks: lock files.
        own: whether this run writes to `tracked`.
    """

    tracked: Path
    other: Path
    locks: Path
    own: bool

    def open(self, made_by: dict[str, Any], shards: int) -> ScoreFolder:
        """The folder of what was made by this, wherever finished work is; created if new."""
        name = hash_values(made_by)[:20]
        tracked, other = (ScoreFolder(root / name, made_by, shards) for root in (self.tracked, self.other))
        if not tracked.missing():
            return tracked
        if not self.own:
            chosen = other
        else:
            chosen = tracked
            if not other.missing():
                shutil.copytree(other.path, tracked.path, dirs_exist_ok=True)
        if not (note := chosen.path / "made_by.json").is_file():
            write_json(note, made_by)
        elif chosen is other and is_local(note):
            note_use(note)
        return chosen

    def tidy(self, used: list[ScoreFolder]) -> None:
        """Move folders that params.yaml's own run no longer uses from DVC's output to the others."""
        names = {folder.path.name for folder in used}
        for path in self.tracked.iterdir():
            if path.is_dir() and path.name not in names:
                shutil.rmtree(self.other / path.name, ignore_errors=True)
                self.other.mkdir(parents=True, exist_ok=True)
                shutil.move(path, self.other / path.name)

    def lock(self, folders: list[ScoreFolder], shard: int, *, wait: bool) -> ExitStack | None:
        """Keep other runs off a shard of these folders, until the returned stack is closed.

        Locks are this machine's, or of a file system that it shares: a store behind a URL has none.
        There, two runs at once may both do a shard; each writes it whole, and the same.

        Args:
            wait: wait for a run that is at work on it.

        Returns:
            None: another run is at work on it, and ``wait`` is false.
        """
        held = ExitStack()
        if not is_local(self.locks):
            return held
        self.locks.mkdir(parents=True, exist_ok=True)
        # In one order for everyone, so that two runs never wait for each other.
        for name in sorted(folder.path.name for folder in folders):
            lock = FileLock(self.locks / f"{name}-{shard:05d}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    held.close()
                    return None
                print(f"waiting for another run that scores shard {shard} of {name}", flush=True)
                lock.acquire()
            held.callback(lock.release)
        for folder in folders:
            folder.remove_partial(shard)
        return held


def _load_samples(path: Path) -> dict[str, Any]:
    with path.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


def _save_samples(target: Path, samples: Samples) -> None:
    with target.open("wb") as file:
        np.savez_compressed(
            file,
            ids=np.array(samples.ids, dtype=str),
            input=samples.input,
            reconstruction=samples.reconstruction,
            unconditional=samples.unconditional,
        )
