"""Shards at work: images in, score tables out."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diffguard.detectors.baselines import detect
from diffguard.diffusion.guidance import oracle_label
from diffguard.engine import Engine, Request, Sample, ScoreResult
from diffguard.errors import DataError
from diffguard.models.classifiers.base import predict_logits
from diffguard.settings import Variant
from diffguard.utils.finite import check_scores
from tasks.common.files import read_image, read_table
from tasks.config.params import Imported
from tasks.config.run import Run
from tasks.models.loaded import Models
from tasks.score.plan import Item, file_of, open_store
from tasks.score.store import Samples

DECODERS = 4
"""Threads that read and decode images ahead of the model."""


@dataclass(eq=False)
class Shard:
    """A shard at work: the items that lack it, by their request's index, and what is found so far."""

    number: int
    rows: pd.DataFrame
    lacking: list[tuple[int, Item]]
    held: ExitStack
    left: int
    found: dict[int, list[ScoreResult | None]] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def records(self) -> list[dict[Hashable, Any]]:
        """The rows, as what is quick to read."""
        return self.rows.to_dict("records")


class Work:
    """One seed's items over some shards. As a context, it lets go of the locks that it still holds."""

    def __init__(self, run: Run, items: list[Item], progress: Callable[[int], object]) -> None:
        self.run, self.store, self.progress = run, open_store(run), progress
        self.variants = [item for item in items if isinstance(item.settings, Variant)]
        self.others = [item for item in items if not isinstance(item.settings, Variant)]
        self.at_work: dict[int, Shard] = {}
        self.written = 0
        self.before = 0.0
        self.postponed: list[int] = []

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self.at_work.values():
            shard.held.close()

    def score(self, models: Models, shards: Sequence[int]) -> None:
        """Score what is no variant, then the variants."""
        for shard in shards:
            self._score_others(models, shard)
        lacking = {item.folder.path for item in self.variants if set(item.folder.missing()) & set(shards)}
        used = [item for item in self.variants if item.folder.path in lacking]
        if not used:
            return
        requests = [
            Request(models.classifiers[item.classifier], models.fitted(item.classifier, item.name)) for item in used
        ]
        engine = Engine(models.denoiser, requests, slots=models.slots)
        self.before = time.perf_counter()
        for wait, numbers in ((False, shards), (True, self.postponed)):
            for key, found in engine.run(self._samples(used, numbers, wait=wait)):
                self._take(key, found)

    def _samples(self, items: list[Item], numbers: Sequence[int], *, wait: bool) -> Iterator[Sample]:
        """The images of what is missing, decoded ahead of the model."""
        with ThreadPoolExecutor(DECODERS) as pool:
            ahead: deque[tuple[Shard, int, Future[torch.Tensor]]] = deque()
            for shard in self._open(items, numbers, wait=wait):
                for row, record in enumerate(shard.records):
                    image = pool.submit(read_image, self.run.home, record["path"], record["content_hash"])
                    ahead.append((shard, row, image))
                    if len(ahead) >= 64:
                        yield self._sample(*ahead.popleft())
            while ahead:
                yield self._sample(*ahead.popleft())

    def _open(self, items: list[Item], numbers: Sequence[int], *, wait: bool) -> Iterator[Shard]:
        """Lock shards, one after another, as their turn comes."""
        size = self.run.params.score.shard_size
        for number in numbers:
            lacking = [(index, item) for index, item in enumerate(items) if not item.folder.has(number)]
            if not lacking:
                continue
            held = self.store.lock([item.folder for _, item in lacking], number, wait=wait)
            if held is None:
                self.postponed.append(number)
                continue
            lacking = [(index, item) for index, item in lacking if not item.folder.has(number)]
            if not lacking:
                held.close()
                continue
            rows = self.run.scored.iloc[number * size : (number + 1) * size]
            found: dict[int, list[ScoreResult | None]] = {index: [None] * len(rows) for index, _ in lacking}
            self.at_work[number] = Shard(number, rows, lacking, held, len(rows), found)
            yield self.at_work[number]

    def _sample(self, shard: Shard, row: int, image: Future[torch.Tensor]) -> Sample:
        values = shard.records[row]
        true = int(values["label"]) if values["role"] == "ind" else -1
        labels = {}
        for index, item in shard.lacking:
            assert isinstance(item.settings, Variant)
            classes = len(self.run.classes)
            label = oracle_label(item.settings.label, true, classes, values["content_hash"])
            if label is not None:
                labels[index] = label
        kept = values["id"] in self.run.sample_ids
        if kept:
            shard.inputs[row] = image.result()
        wanted = [index for index, _ in shard.lacking]
        return Sample((shard.number, row), image.result(), wanted, labels, unconditional=kept)

    def _take(self, key: Any, found: dict[int, ScoreResult]) -> None:
        """File what was found of an image; write its shard if it was the last."""
        number, row = key
        shard = self.at_work[number]
        for index, each in found.items():
            # Pictures of the others are not kept.
            shard.found[index][row] = each if row in shard.inputs else each.without_images()
        shard.left -= 1
        if shard.left:
            return
        now = time.perf_counter()
        seconds, self.before = now - self.before, now
        for index, item in shard.lacking:
            mine = [each for each in shard.found[index] if each is not None]
            table = _table(item, shard.rows, [each.label for each in mine], [each.score for each in mine])
            table["steps"] = [each.level for each in mine]
            assert isinstance(item.settings, Variant)
            samples = _samples(shard, mine) if item.settings.reconstructs else None
            item.folder.write(number, table, samples, seconds)
        del self.at_work[number]
        shard.held.close()
        self.written += len(shard.lacking)
        self.progress(len(shard.rows))

    def _score_others(self, models: Models, number: int) -> None:
        lacking = [item for item in self.others if not item.folder.has(number)]
        if not lacking:
            return
        with self.store.lock([item.folder for item in lacking], number, wait=True) or ExitStack():
            size = self.run.params.score.shard_size
            rows = self.run.scored.iloc[number * size : (number + 1) * size]
            images = models.read(rows)
            logits = {
                name: predict_logits(models.classifiers[name], images) for name in {i.classifier for i in lacking}
            }
            for name, values in logits.items():
                check_scores(values.sum(dim=1).cpu().numpy(), f"classifier {name}", rows["id"].tolist())
            for item in lacking:
                if item.folder.has(number):
                    continue
                started = time.perf_counter()
                if isinstance(item.settings, Imported):
                    scores = torch.tensor(read_scores(file_of(self.run, item.settings), rows["id"]))
                else:
                    detector = models.detectors[item.classifier, item.name]
                    scores = detect(detector, images, logits[item.classifier])
                predicted = logits[item.classifier].argmax(dim=1)
                table = _table(item, rows, predicted.tolist(), scores.double().tolist())
                table["steps"] = 0
                item.folder.write(number, table, None, time.perf_counter() - started)
                self.written += 1


def read_scores(path: Path, ids: pd.Series) -> list[float]:
    """Scores made elsewhere of these images, in their order.

    Raises:
        DataError: the file lacks a column or an image, has one twice, or a score is not a finite number.
    """
    table = read_table(path)
    for column in ("id", "score"):
        if column not in table:
            raise DataError(f"{path}: the column {column} is missing")
    if twice := table["id"][table["id"].duplicated()].tolist():
        raise DataError(f"{path}: {twice[0]} has two rows")
    scores = pd.to_numeric(table.set_index("id")["score"], errors="coerce").reindex(ids)
    if wrong := scores.index[~np.isfinite(scores)].tolist():
        raise DataError(f"{path}: {wrong[0]} has no row with a finite score; {len(wrong)} such images")
    return [float(score) for score in scores]


def _table(item: Item, rows: pd.DataFrame, predicted: list[int], score: list[float]) -> pd.DataFrame:
    check_scores(score, item.title, rows["id"].tolist())
    table = rows[["id", "dataset", "split", "label"]].reset_index(drop=True)
    return table.assign(predicted=predicted, score=score, variant=item.name)


def _samples(shard: Shard, found: list[ScoreResult]) -> Samples | None:
    """The pictures that are kept of a shard."""
    rows = sorted(shard.inputs)
    if not rows:
        return None
    mine = [found[row] for row in rows]
    return Samples(
        ids=shard.rows["id"].iloc[rows].tolist(),
        input=_bytes([shard.inputs[row] for row in rows]),
        reconstruction=_bytes([each.reconstruction for each in mine]),
        unconditional=_bytes([each.unconditional for each in mine]),
    )


def _bytes(images: list[Any]) -> Any:
    return (torch.stack(images) * 255).round().to(torch.uint8).cpu().numpy()
