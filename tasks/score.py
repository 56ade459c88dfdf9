"""Stage score: every variant's and baseline's score of every image, where it is not there yet."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from diffguard import METHOD_VERSION
from diffguard.classifiers import Classifier, import_object, load_classifier, predict_logits
from diffguard.denoisers import LatentDenoiser, PixelDenoiser, load_denoiser
from diffguard.errors import SettingError
from diffguard.scoring import Request, Scored, fit_variant, oracle_labels, score_batch
from diffguard.settings import Variant
from tasks.command import run_stage
from tasks.files import hash_file, hash_values, read_images
from tasks.run import Run, open_run
from tasks.settings import Baseline
from tasks.store import SCHEMA_VERSION, Samples, ScoreFolder, Store
from tasks.train import DENOISER, model_path


@dataclass(frozen=True)
class Item:
    """One row of the result table at one training seed, and the folder of its scores."""

    seed: int
    classifier: str
    name: str
    settings: Variant | Baseline
    folder: ScoreFolder

    @property
    def title(self) -> str:
        """For messages: which scores these are."""
        return f"scores of {self.name} ({self.classifier}, seed {self.seed})"


def open_store(run: Run) -> Store:
    """The store that a run reads and writes."""
    return Store(run.home / "scores", run.other / "scores", run.other / "locks", own=run.own)


def plan(run: Run) -> list[Item]:
    """Everything that a run needs scored, with the folders where it is or will be."""
    store = open_store(run)
    images = _hash_rows(run.scored, ["id", "dataset", "split", "content_hash"])
    train = _hash_rows(run.manifest[run.manifest["split"] == "train"], ["id", "label", "content_hash"])
    score = run.params.score
    common = {
        "schema_version": SCHEMA_VERSION,
        "images": images,
        "shard_size": score.shard_size,
    }
    items = []
    for seed in run.params.seeds:
        denoiser = hash_file(model_path(run.models(seed), DENOISER))
        for classifier in run.params.classifiers:
            common["classifier"] = hash_file(model_path(run.models(seed), classifier))
            for name, variant in score.variants.items():
                made_by = {
                    **common,
                    "denoiser": denoiser,
                    "method_version": METHOD_VERSION,
                    "samples": score.samples,
                    "variant": variant.model_dump(mode="json"),
                }
                items.append(Item(seed, classifier, name, variant, store.open(made_by, run.shards)))
            for name, baseline in score.baselines.items():
                made_by = {**common, "train_images": train, "baseline": baseline.model_dump(mode="json")}
                items.append(Item(seed, classifier, name, baseline, store.open(made_by, run.shards)))
    return items


def score_shard(run: Run, items: list[Item], shard: int) -> int:
    """Score one shard of everything that lacks it.

    Returns:
        How many score tables were written; 0 when all were there.
    """
    lacking = [item for item in items if shard in item.folder.missing()]
    with open_store(run).locked([item.folder for item in lacking], shard):
        lacking = [item for item in lacking if shard in item.folder.missing()]
        if not lacking:
            return 0
        start = shard * run.params.score.shard_size
        rows = run.scored.iloc[start : start + run.params.score.shard_size]
        images = read_images(run.home, rows)
        for seed in sorted({item.seed for item in lacking}):
            models = load_models(run, seed)
            here = [item for item in lacking if item.seed == seed]
            _score_variants(run, models, [i for i in here if isinstance(i.settings, Variant)], shard, rows, images)
            _score_baselines(models, [i for i in here if isinstance(i.settings, Baseline)], shard, rows, images)
    return len(lacking)


def score(run: Run) -> list[Item]:
    """Score everything that is missing, and put away what params.yaml no longer asks for."""
    items = plan(run)
    for shard in range(run.shards):
        score_shard(run, items, shard)
    finish(run, items)
    return items


def finish(run: Run, items: list[Item]) -> None:
    """Leave in DVC's output exactly what params.yaml's own run made."""
    if run.own:
        open_store(run).tidy([item.folder for item in items])


@dataclass(frozen=True)
class Models:
    """The models of one seed, and what is fitted with them. Loaded once a process."""

    run: Run
    seed: int

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def denoiser(self) -> PixelDenoiser | LatentDenoiser:
        return load_denoiser(model_path(self.run.models(self.seed), DENOISER)).to(self.device).channels_last()

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        folder = self.run.models(self.seed)
        return {name: load_classifier(model_path(folder, name)).to(self.device) for name in self.run.params.classifiers}

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        rows = self.run.manifest[self.run.manifest["split"] == "train"]
        return self.read(rows), torch.tensor(rows["label"].to_numpy(), device=self.device)

    def read(self, rows: pd.DataFrame) -> Tensor:
        """The images of these rows, on the device."""
        return read_images(self.run.home, rows).to(self.device)

    @cached_property
    def fitted(self) -> dict[tuple[str, str], Variant]:
        variants = self.run.params.score.variants
        if any(variant.needs_fit for variant in variants.values()):
            images = self.read(self.run.scored[self.run.scored["split"] == "calibration"])
        return {
            (classifier, name): fit_variant(variant, self.denoiser, network, images) if variant.needs_fit else variant
            for classifier, network in self.classifiers.items()
            for name, variant in variants.items()
        }

    @cached_property
    def detectors(self) -> dict[tuple[str, str], Any]:
        return {
            (classifier, name): fit_baseline(name, baseline, network, *self.train)
            for classifier, network in self.classifiers.items()
            for name, baseline in self.run.params.score.baselines.items()
        }


_loaded: dict[tuple[str, bool, int], Models] = {}


def load_models(run: Run, seed: int) -> Models:
    """The models of one seed, once a process."""
    key = (run.name, run.own, seed)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = Models(run, seed)
    return _loaded[key]


def fit_baseline(name: str, baseline: Baseline, classifier: Any, images: Tensor, labels: Tensor) -> Any:
    """Build a pytorch-ood detector, and fit it on the train split where it needs that.

    Raises:
        SettingError: it cannot be imported or built with these arguments.
    """
    model = {
        "logits": lambda: classifier,
        "features": lambda: classifier.features,
        "pixels": lambda: torch.nn.Flatten(),
    }[baseline.sees]()
    factory = import_object(baseline.detector)
    try:
        detector = factory(model, **baseline.arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(f"score.baselines.{name}: {baseline.detector} cannot be built ({error})") from None
    detector.to(images.device)
    if detector.requires_fit:
        detector.fit([(images, labels)])
    return detector


def _score_variants(
    run: Run, models: Models, items: list[Item], shard: int, rows: pd.DataFrame, images: Tensor
) -> None:
    if not items:
        return
    started = time.perf_counter()
    keep = torch.tensor(rows["id"].isin(run.sample_ids).to_numpy())
    title = f"score shard {shard + 1}/{run.shards}, {len(items)} variants"
    parts: list[list[Scored]] = []
    for batch in _batches(len(rows), run.params.score.batch_size, title):
        requests = [_request(item, models, rows[batch], images[batch]) for item in items]
        parts.append(score_batch(images[batch], models.denoiser, requests, unconditional_for=keep[batch]))
    seconds = time.perf_counter() - started
    for number, item in enumerate(items):
        mine = [part[number] for part in parts]
        table = _table(item, rows, torch.cat([m.label for m in mine]), torch.cat([m.score for m in mine]))
        table["steps"] = torch.cat([m.level for m in mine]).cpu().numpy()
        item.folder.write(shard, table, _samples(rows, images, mine, keep), seconds)


def _request(item: Item, models: Models, rows: pd.DataFrame, images: Tensor) -> Request:
    classifier, variant = models.classifiers[item.classifier], models.fitted[item.classifier, item.name]
    if variant.label == "predicted":
        return Request(classifier, variant)
    predicted = predict_logits(classifier, images).argmax(dim=1)
    true = torch.tensor(rows["label"].where(rows["role"] == "ind", -1).to_numpy(), device=images.device)
    keys = rows["content_hash"].tolist()
    return Request(classifier, variant, oracle_labels(variant.label, predicted, true, classifier.num_classes, keys))


def _score_baselines(models: Models, items: list[Item], shard: int, rows: pd.DataFrame, images: Tensor) -> None:
    for item in items:
        started = time.perf_counter()
        with torch.no_grad():
            scores = models.detectors[item.classifier, item.name].predict(images)
        predicted = predict_logits(models.classifiers[item.classifier], images).argmax(dim=1)
        table = _table(item, rows, predicted, scores)
        table["steps"] = 0
        item.folder.write(shard, table, None, time.perf_counter() - started)


def _table(item: Item, rows: pd.DataFrame, predicted: Tensor, score: Tensor) -> pd.DataFrame:
    table = rows[["id", "dataset", "role", "split", "label"]].reset_index(drop=True)
    return table.assign(predicted=predicted.cpu().numpy(), score=score.double().cpu().numpy(), variant=item.name)


def _samples(rows: pd.DataFrame, images: Tensor, parts: list[Scored], keep: Tensor) -> Samples | None:
    if not keep.any():
        return None
    # A batch without samples has no unconditional reconstructions; none of its rows is kept.
    unconditional = [p.reconstruction if p.unconditional is None else p.unconditional for p in parts]
    return Samples(
        ids=rows["id"][keep.numpy()].tolist(),
        input=_bytes(images.cpu()[keep]),
        reconstruction=_bytes(torch.cat([part.reconstruction.cpu() for part in parts])[keep]),
        unconditional=_bytes(torch.cat(unconditional).cpu()[keep]),
    )


def _bytes(images: Tensor) -> Any:
    return (images * 255).round().to(torch.uint8).cpu().numpy()


def _batches(count: int, size: int, title: str) -> Iterator[slice]:
    with tqdm(total=count, desc=title, unit="image", mininterval=0.5) as bar:
        for start in range(0, count, size):
            yield slice(start, start + size)
            bar.update(min(size, count - start))


def _hash_rows(rows: pd.DataFrame, columns: list[str]) -> str:
    return hash_values(rows[columns].values.tolist())


def main() -> None:
    items = score(open_run())
    print(f"{len(items)} score tables are complete")


if __name__ == "__main__":
    run_stage(main)
