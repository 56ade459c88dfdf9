"""A place that every scoring machine reaches, by an fsspec URL: what scoring reads goes there, scores come back."""

import tempfile
from pathlib import Path

from diffguard.models.folder import HASH_FILE, hash_model, read_reference, save_model
from diffguard.utils.hashing import hash_file
from tasks.common.files import write_whole
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run
from tasks.models.checks import open_model
from tasks.score.plan import Item, file_of


def publish(run: Run, items: list[Item], shared: Run) -> None:
    """Copy a run's manifest, images, models and scores from elsewhere, and the shards there already, to a shared place.

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
            _put_model(run, run.model(seed, name), shared.model(seed, name))
    for imported in run.params.score.imported.values():
        _put(file_of(run, imported), file_of(shared, imported))
    _copy_shards([item.folder.path for item in items], shared.other / "scores")


def collect(items: list[Item], shared: list[Item]) -> None:
    """Copy the shards that a shared place has to where this machine's run looks for them."""
    for item, there in zip(items, shared, strict=True):
        assert item.folder.made_by == there.folder.made_by
        _copy_shards([there.folder.path], item.folder.path.parent)


def _put_model(run: Run, model: Path, there: Path) -> None:
    """Copy a model; one that is a reference to this machine's files with what they hold."""
    spec = read_reference(model)
    if spec is None:
        _mirror(model, there)
        return
    note, hash_here = there / HASH_FILE, hash_model(model, run.code)
    if note.is_file() and note.read_text(encoding="utf-8") == hash_here:
        return
    note.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model"
        save_model(open_model(run, model), spec, made)
        _mirror(made, there)
    write_whole(note, lambda target: target.write_text(hash_here, encoding="utf-8"))


def _mirror(source: Path, target: Path) -> None:
    """Make a folder hold another's files and no others."""
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    if target.is_dir():
        for path in target.rglob("*"):
            if path.is_file() and str(path.relative_to(target)) not in files:
                path.unlink()
    for name in sorted(files):
        _put(source / name, target / name)


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
