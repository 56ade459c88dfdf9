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
from diffguard.engine import EngineProcesses, Request, Sample, ScoreResult, core_count, engine_for, start_ahead
from diffguard.errors import DataError
from diffguard.images import to_picture, to_tensor
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

WORTH_PROCESSES = 1000
"""From so many images times variants on processes are started ahead; whether they are used is measured then."""


@dataclass(eq=False)
class Shard:
    """A shard at work.

    Attributes:
        missing: the items that have no scores of it, with the index of their request.
        locks: held until it is written.
        pending: images that the engine has not finished.
        results: by request, one for each row; None: pending.
        inputs: the images whose pictures are kept, by row.
    """

    number: int
    rows: pd.DataFrame
    missing: list[tuple[int, Item]]
    locks: ExitStack
    pending: int
    results: dict[int, list[ScoreResult | None]] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def records(self) -> list[dict[Hashable, Any]]:
        """The rows as plain dictionaries, which are quick to read."""
        return self.rows.to_dict("records")


class ShardScoring:
    """Scores the items of one training seed, shard by shard; as a context, it releases the locks that it holds."""

    def __init__(self, run: Run, items: list[Item], progress: Callable[[int], object]) -> None:
        self.run, self.store, self.progress = run, open_store(run), progress
        self.variants = [item for item in items if isinstance(item.settings, Variant)]
        self.others = [item for item in items if not isinstance(item.settings, Variant)]
        self.at_work: dict[int, Shard] = {}
        self.written = 0
        self.last_written = 0.0
        self.postponed: list[int] = []

    def __enter__(self) -> "ShardScoring":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self.at_work.values():
            shard.locks.close()

    def score(self, models: Models, shards: Sequence[int]) -> None:
        """Score baselines and imported rows, then the variants."""
        incomplete = {item.folder.path for item in self.variants if set(item.folder.missing()) & set(shards)}
        items = [item for item in self.variants if item.folder.path in incomplete]
        images = sum(self.run.rows_of(shard) for shard in shards)
        with ExitStack() as stack:
            ahead = None
            if models.device.type == "cpu" and len(items) * images >= WORTH_PROCESSES and core_count() > 1:
                # They take seconds to start, in which the others are scored.
                ahead = start_ahead(core_count())
                stack.callback(ahead.shutdown, wait=True, kill_workers=True)
            for shard in shards:
                self._score_others(models, shard)
            if items:
                self._score_variants(models, items, shards, images, ahead)

    def _score_variants(
        self, models: Models, items: list[Item], shards: Sequence[int], images: int, ahead: Any
    ) -> None:
        requests = [
            Request(models.classifiers[item.classifier], models.fitted(item.classifier, item.name)) for item in items
        ]
        with engine_for(models.denoiser, requests, models.tuning, images, ahead) as engine:
            if isinstance(engine, EngineProcesses):
                print(f"scoring in {engine.processes} processes of one thread each", flush=True)
            self.last_written = time.perf_counter()
            for wait, numbers in ((False, shards), (True, self.postponed)):
                for key, results in engine.run(self._samples(items, numbers, wait=wait)):
                    self._collect(key, results)

    def _samples(self, items: list[Item], numbers: Sequence[int], *, wait: bool) -> Iterator[Sample]:
        """The images of what is missing, decoded ahead of the model."""
        with ThreadPoolExecutor(DECODERS) as pool:
            ahead: deque[tuple[Shard, int, Future[torch.Tensor]]] = deque()
            for shard in self._open(items, numbers, wait=wait):
                for row, record in enumerate(shard.records):
                    image = pool.submit(self._read, record)
                    ahead.append((shard, row, image))
                    if len(ahead) >= 64:
                        yield self._sample(*ahead.popleft())
            while ahead:
                yield self._sample(*ahead.popleft())

    def _read(self, record: dict[Hashable, Any]) -> torch.Tensor:
        """The image of a row, changed as the run says."""
        image = read_image(self.run.home, record["path"], record["content_hash"])
        return image if self.run.change is None else to_tensor(self.run.change.apply(to_picture(image)))

    def _open(self, items: list[Item], numbers: Sequence[int], *, wait: bool) -> Iterator[Shard]:
        """Lock shards one after another; those that another run holds are postponed, or waited for."""
        size = self.run.params.score.shard_size
        for number in numbers:
            missing = [(index, item) for index, item in enumerate(items) if not item.folder.has(number)]
            if not missing:
                continue
            locks = self.store.lock([item.folder for _, item in missing], number, wait=wait)
            if locks is None:
                self.postponed.append(number)
                continue
            # Another run may have written them before the lock was ours.
            missing = [(index, item) for index, item in missing if not item.folder.has(number)]
            if not missing:
                locks.close()
                continue
            rows = self.run.scored.iloc[number * size : (number + 1) * size]
            results: dict[int, list[ScoreResult | None]] = {index: [None] * len(rows) for index, _ in missing}
            self.at_work[number] = Shard(number, rows, missing, locks, len(rows), results)
            yield self.at_work[number]

    def _sample(self, shard: Shard, row: int, image: Future[torch.Tensor]) -> Sample:
        record = shard.records[row]
        true_label = int(record["label"]) if record["role"] == "ind" else -1
        labels = {}
        for index, item in shard.missing:
            assert isinstance(item.settings, Variant)
            classes = len(self.run.classes)
            label = oracle_label(item.settings.label, true_label, classes, record["content_hash"])
            if label is not None:
                labels[index] = label
        is_kept = record["id"] in self.run.sample_ids
        if is_kept:
            shard.inputs[row] = image.result()
        wanted = [index for index, _ in shard.missing]
        return Sample((shard.number, row), image.result(), wanted, labels, unconditional=is_kept)

    def _collect(self, key: Any, results: dict[int, ScoreResult]) -> None:
        """Keep the results of an image; write its shard if it was the last one."""
        number, row = key
        shard = self.at_work[number]
        for index, result in results.items():
            shard.results[index][row] = result if row in shard.inputs else result.without_images()
        shard.pending -= 1
        if shard.pending:
            return
        now = time.perf_counter()
        seconds, self.last_written = now - self.last_written, now
        for index, item in shard.missing:
            finished = [result for result in shard.results[index] if result is not None]
            labels, scores = [result.label for result in finished], [result.score for result in finished]
            table = _table(item, shard.rows, labels, scores).assign(steps=[result.level for result in finished])
            if finished and finished[0].denoiser_label is not None:
                table["denoiser_label"] = [result.denoiser_label for result in finished]
            assert isinstance(item.settings, Variant)
            samples = _samples(shard, finished) if item.settings.reconstructs else None
            item.folder.write(number, table, samples, seconds)
        del self.at_work[number]
        shard.locks.close()
        self.written += len(shard.missing)
        self.progress(len(shard.rows))

    def _score_others(self, models: Models, number: int) -> None:
        """Score what baselines and imported rows have not of a shard."""
        missing = [item for item in self.others if not item.folder.has(number)]
        if not missing:
            return
        with self.store.lock([item.folder for item in missing], number, wait=True) or ExitStack():
            size = self.run.params.score.shard_size
            rows = self.run.scored.iloc[number * size : (number + 1) * size]
            images = torch.stack([self._read(record) for record in rows.to_dict("records")]).to(models.device)
            classifiers = {item.classifier for item in missing}
            logits = {name: predict_logits(models.classifiers[name], images) for name in classifiers}
            for name, values in logits.items():
                check_scores(values.sum(dim=1).cpu().numpy(), f"classifier {name}", rows["id"].tolist())
            for item in missing:
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
    """Imported scores of these images, in their order.

    Raises:
        DataError: the file lacks a column or an image, has one twice, or a score is not a finite number.
    """
    table = read_table(path)
    for column in ("id", "score"):
        if column not in table:
            raise DataError(f"{path}: the column {column} is missing")
    if duplicates := table["id"][table["id"].duplicated()].tolist():
        raise DataError(f"{path}: {duplicates[0]} has two rows")
    scores = pd.to_numeric(table.set_index("id")["score"], errors="coerce").reindex(ids)
    if wrong := scores.index[~np.isfinite(scores)].tolist():
        raise DataError(f"{path}: {wrong[0]} has no row with a finite score; {len(wrong)} such images")
    return [float(score) for score in scores]


def _table(item: Item, rows: pd.DataFrame, predicted: list[int], score: list[float]) -> pd.DataFrame:
    check_scores(score, item.title, rows["id"].tolist())
    table = rows[["id", "dataset", "split", "label"]].reset_index(drop=True)
    return table.assign(predicted=predicted, score=score, variant=item.name)


def _samples(shard: Shard, results: list[ScoreResult]) -> Samples | None:
    """The pictures that are kept of a shard; None: there are none."""
    rows = sorted(shard.inputs)
    if not rows:
        return None
    kept = [results[row] for row in rows]
    return Samples(
        ids=shard.rows["id"].iloc[rows].tolist(),
        input=_bytes([shard.inputs[row] for row in rows]),
        reconstruction=_bytes([result.reconstruction for result in kept]),
        unconditional=_bytes([result.unconditional for result in kept]),
    )


def _bytes(images: list[Any]) -> Any:
    return (torch.stack(images) * 255).round().to(torch.uint8).cpu().numpy()
