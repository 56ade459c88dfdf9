"""The detector bundle: a plain folder with everything that a deployed detector needs, and its hashes.

    detector.json        what it is (`DetectorInfo`), the SHA-256 of each other file, and one of all that
    classifier/          the model, or a reference to where it comes from (`diffguard.models.folder`)
    denoiser/            the same; absent if no row diffuses
    fitted/<view>.safetensors   what baselines were fitted on: `values` and `labels` of the train split
    calibration.parquet  scores of the InD images that p-values come from
    validation.parquet   scores of the images that choices are made on
    example.png          an InD image

Nothing in it is pickled, and no path in it is of this machine, so that it can be moved and shared.
"""

import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from diffguard.deploy.detector import DeployedDetector
from diffguard.deploy.info import DetectorInfo
from diffguard.detectors.parts import view
from diffguard.errors import DataError, DiffGuardError
from diffguard.images import read_picture
from diffguard.models.denoisers.base import with_channels_last
from diffguard.models.folder import check_reference, open_model, read_reference, save_model
from diffguard.models.weights import read_weights
from diffguard.settings import Settings, parse_settings
from diffguard.utils.atomic import atomic_folder
from diffguard.utils.hashing import hash_file, hash_values
from diffguard.utils.importing import check_names
from diffguard.utils.text import first_line
from diffguard.version import METHOD_VERSION

FORMAT_VERSION = 2
"""Raised whenever the layout of a bundle changes."""

MOST_TABLE_BYTES = 2**30
"""Of a table in memory: some millions of images."""

INFO_FILE = "detector.json"
CALIBRATION_FILE, VALIDATION_FILE, EXAMPLE_FILE = "calibration.parquet", "validation.parquet", "example.png"
TABLE_COLUMNS = ("id", "content_hash", "role", "dataset", "split", "predicted")
"""Of both tables, beside the scores: what an image is, and what the classifier says of it."""


class _Written(Settings):
    """detector.json; ``hash`` is of ``info`` and ``files``."""

    format: int
    info: DetectorInfo
    files: dict[str, str]
    hash: str


def save_bundle(detector: DeployedDetector, folder: str | Path) -> None:
    """Write a detector into a folder, whole or not at all. A bundle that is there already is replaced at once.

    Raises:
        SettingError: a model can neither be stored nor referred to.
        DataError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    with _new_bundle(folder) as new:
        save_model(detector.classifier, detector.specs.get("classifier"), new / "classifier")
        if detector.denoiser is not None:
            save_model(detector.denoiser, detector.specs.get("denoiser"), new / "denoiser")
        (new / "fitted").mkdir()
        for sees, (values, labels) in detector.seen.items():
            tensors = {"values": values.contiguous(), "labels": labels.contiguous()}
            save_file(tensors, new / "fitted" / f"{sees}.safetensors")
        detector.calibration.to_parquet(new / CALIBRATION_FILE, index=False)
        detector.validation.to_parquet(new / VALIDATION_FILE, index=False)
        detector.example.save(new / EXAMPLE_FILE)
        contents = {"info": detector.info.model_dump(mode="json"), "files": _hashes(new)}
        text = json.dumps({"format": FORMAT_VERSION, **contents, "hash": hash_values(contents)}, indent=2)
        (new / INFO_FILE).write_text(text + "\n", encoding="utf-8")


def load_bundle(
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    slots: int | None = None,
    bundle_hash: str | None = None,
    trust: Collection[str] = (),
) -> DeployedDetector:
    """Load a bundle. Nothing that its files name is imported, but the library's own and pytorch-ood's detectors.

    Args:
        device: where it decides; None: a GPU if there is one.
        slots: images in a network call; None: measured when the first image is diffused.
        bundle_hash: that it must have, as recorded elsewhere (`hash_bundle`); None: any.
        trust: code that it may name all the same: ``package``, ``package.module`` or ``package.module:name``. Its
            hashes are its author's own, and prove nothing of it.

    Raises:
        DataError: it is no bundle, a file is missing or was changed, it names a file outside of it or code that is
            not trusted, or it is of another version of DiffGuard; the message says what to do.
        ServiceError: a model that it refers to cannot be downloaded.
    """
    folder = Path(folder)
    info, found = check_code(folder, trust), hash_bundle(folder)
    if bundle_hash not in (None, found):
        raise DataError(f"{folder / INFO_FILE}: not the one that was recorded with the model; log it anew")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    specs, models = dict[str, Any](), dict[str, Any]()
    for name in ("classifier", "denoiser"):
        if (folder / name).is_dir():
            specs[name] = read_reference(folder / name)
            models[name] = open_model(folder / name, info.classes, info.image.size, trust).to(device)
    denoiser = with_channels_last(models["denoiser"]) if "denoiser" in models else None
    seen = {}
    for path in sorted((folder / "fitted").glob("*.safetensors")):
        tensors = read_weights(path)
        if tensors.keys() != {"values", "labels"} or len(tensors["values"]) != len(tensors["labels"]):
            raise DataError(f"{path}: not values and their labels; make the bundle anew")
        seen[path.stem] = (tensors["values"], tensors["labels"])
    try:
        detector = DeployedDetector(
            info,
            models["classifier"],
            denoiser,
            calibration=_read_table(folder / CALIBRATION_FILE),
            validation=_read_table(folder / VALIDATION_FILE),
            seen=seen,
            example=read_picture(folder / EXAMPLE_FILE),
            specs=specs,
            slots=slots,
        )
    except KeyError as error:
        raise DataError(f"{folder}: {error} is missing in it; make the bundle anew") from None
    except DiffGuardError as error:
        raise type(error)(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    except Exception as error:  # whatever a fit, a row or a table raises for values of another kind or shape
        raise DataError(
            f"{folder}: its parts do not fit together ({first_line(error)}); make the bundle anew"
        ) from None
    _check_seen(detector, folder)
    detector.bundle_hash = found
    return detector


@torch.no_grad()
def _check_seen(detector: DeployedDetector, folder: Path) -> None:
    """Raise a DataError if baselines were fitted on values of another shape than what they see of an image."""
    image = detector.prepare(detector.example)[None].to(detector.device)
    for sees, (values, _) in detector.seen.items():
        shape = tuple(view(sees, detector.classifier)(image).shape[1:])
        if tuple(values.shape[1:]) != shape:
            raise DataError(
                f"{folder / 'fitted' / sees}.safetensors: values of the shape {tuple(values.shape[1:])}, and of an "
                f"image {shape} is seen; make the bundle anew"
            )


def _read_table(path: Path) -> pd.DataFrame:
    try:
        _check_table(path)
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file ({first_line(error)}); make the bundle anew") from None


def _check_table(path: Path) -> None:
    """Raise a DataError if a table, a few bytes of which can stand for any number of rows, is too large to be read."""
    size = 0
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=1024):
            size += batch.nbytes
            if size > MOST_TABLE_BYTES:
                raise DataError(f"{path}: more than {MOST_TABLE_BYTES:,} bytes of table; make the bundle anew")


def check_code(folder: str | Path, trust: Collection[str]) -> DetectorInfo:
    """`check_bundle`, and that it names no file outside of it and no code that is not trusted.

    Raises:
        DataError: see `load_bundle`.
    """
    folder = Path(folder)
    info = check_bundle(folder)
    check_names(_code_of(info), folder / INFO_FILE, trust)
    for name in ("classifier", "denoiser"):
        check_reference(folder / name, trust)
    return info


def _code_of(info: DetectorInfo) -> list[str]:
    """What its rows name as ``package.module:name``."""
    distances = [name for variant in info.variants.values() for name in variant.distances]
    return [*(row.detector for row in info.baselines.values()), *(name for name in distances if ":" in name)]


def hash_bundle(folder: str | Path) -> str:
    """SHA-256 of a bundle's detector.json, which holds those of all other files."""
    return hash_file(Path(folder) / INFO_FILE)


def check_bundle(folder: str | Path) -> DetectorInfo:
    """What a bundle is, once all of its files are as they were written.

    Raises:
        DataError: see `load_bundle`.
    """
    folder = Path(folder)
    written = _read_written(folder)
    if links := sorted(each for each in folder.rglob("*") if each.is_symlink() and not _is_within(each, folder)):
        raise DataError(
            f"{links[0]}: a link out of the bundle; copy the bundle with what its links mean (cp -rL), or, if the link "
            "is DVC's, let it make none: dvc config cache.type reflink,hardlink,copy && dvc checkout --relink"
        )
    if strange := sorted(each for each in folder.rglob("*") if not each.is_file() and not each.is_dir()):
        raise DataError(f"{strange[0]}: neither a file nor a folder; copy the bundle again, or make it anew")
    found = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()} - {INFO_FILE}
    if lacking := sorted(set(written.files) - found):
        raise DataError(f"{folder / lacking[0]}: missing in the bundle; copy it again, or make it anew")
    if foreign := sorted(found - set(written.files)):
        raise DataError(f"{folder / foreign[0]}: not a file of the bundle; remove it, or make the bundle anew")
    for name, recorded in written.files.items():
        if hash_file(folder / name) != recorded:
            raise DataError(f"{folder / name}: not as it was written; copy the bundle again, or make it anew")
    return written.info


def recorded_files(folder: str | Path) -> list[str]:
    """The other files of a bundle whose detector.json is there: relative names, none of which leads out of it.

    Raises:
        DataError: detector.json is missing, damaged or of another version of DiffGuard.
    """
    return sorted(_read_written(Path(folder)).files)


def _read_written(folder: Path) -> _Written:
    path = folder / INFO_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        form, info = values["format"], values["info"]
        method, made_by = info["method_version"], info["diffguard"]
    except FileNotFoundError:
        raise DataError(f"{folder}: no detector here ({INFO_FILE} is missing); make one: dvc repro bundle") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; make the bundle anew, or copy it again") from None
    if form != FORMAT_VERSION:
        raise DataError(
            f"{folder}: a bundle of format {form}, written by diffguard {made_by}; this diffguard reads format "
            f"{FORMAT_VERSION}: install that version, or make the bundle anew"
        )
    if method != METHOD_VERSION:
        raise DataError(
            f"{folder}: its scores are of method version {method} (diffguard {made_by}), this diffguard's of "
            f"{METHOD_VERSION}: they cannot be compared; make the bundle anew, or install that version"
        )
    if values.get("hash") != hash_values({"info": info, "files": values.get("files")}):
        raise DataError(f"{path}: not as it was written; copy the bundle again, or make it anew")
    written = parse_settings(_Written, values, str(path))
    if outside := sorted(name for name in written.files if Path(name).is_absolute() or ".." in Path(name).parts):
        raise DataError(f"{path}: it names {outside[0]!r}, which is no file of the bundle; make the bundle anew")
    return written


def _is_within(link: Path, folder: Path) -> bool:
    return link.resolve().is_relative_to(folder.resolve())


def check_new(folder: str | Path) -> None:
    """Check that a new bundle can be written into a folder that is not there yet, or empty; nothing is left there.

    Raises:
        DataError: it cannot, or something is there.
    """
    folder = Path(folder)
    try:
        if _is_taken(folder):
            raise DataError(f"{folder}: is there already; name a new folder")
        there = next(each for each in folder.absolute().parents if each.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{folder.name}-"):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be written ({error.strerror or error}); name another folder")


def _hashes(folder: Path) -> dict[str, str]:
    files = (each for each in sorted(folder.rglob("*")) if each.is_file())
    return {each.relative_to(folder).as_posix(): hash_file(each) for each in files}


@contextmanager
def _new_bundle(folder: Path) -> Iterator[Path]:
    """A new folder that becomes the bundle's, in place of a bundle that is there already."""
    try:
        if _is_taken(folder) and not (folder / INFO_FILE).is_file():
            raise DataError(f"{folder}: there is something that is no bundle; move it, or name another folder")
        with atomic_folder(folder) as new:
            yield new
    except OSError as error:
        raise _unwritable(folder, error) from None
