"""A place that every scoring machine reaches, by an fsspec URL: what scoring reads goes there, scores come back."""

from pathlib import Path

from diffguard.hashing import hash_file
from tasks.files import write_whole
from tasks.run import Run
from tasks.score import Item
from tasks.settings import DENOISER


def publish(run: Run, items: list[Item], shared: Run) -> None:
    """Copy a run's manifest, images and models, and the shards that are there already, to a shared place.

    Args:
        shared: the same run, opened with the place's URL as its data.
    """
    _put(run.home / "manifest.parquet", shared.home / "manifest.parquet")
    for path in run.manifest["path"]:
        # An image never changes under its name unless its manifest does; scoring checks its hash.
        if not (shared.home / path).is_file():
            _put(run.home / path, shared.home / path)
    for seed in run.params.seeds:
        for name in (DENOISER, *run.params.classifiers):
            model, there = run.model(seed, name), shared.model(seed, name)
            for path in sorted(model.rglob("*")):
                if path.is_file():
                    _put(path, there / path.relative_to(model))
    _copy_shards([item.folder.path for item in items], shared.other / "scores")


def collect(items: list[Item], shared: list[Item]) -> None:
    """Copy the shards that a shared place has to where this machine's run looks for them."""
    for item, there in zip(items, shared, strict=True):
        assert item.folder.made_by == there.folder.made_by
        _copy_shards([there.folder.path], item.folder.path.parent)


def _copy_shards(folders: list[Path], to: Path) -> None:
    for folder in folders:
        # A shard counts from the moment its table is there: pictures first.
        for path in sorted(folder.iterdir(), key=lambda each: each.suffix == ".parquet"):
            target = to / folder.name / path.name
            if path.name.startswith("shard-") and not target.is_file():
                _put(path, target)


def _put(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, unless the same is there."""
    if target.is_file() and hash_file(target) == hash_file(source):
        return
    write_whole(target, lambda temporary: temporary.write_bytes(source.read_bytes()))
