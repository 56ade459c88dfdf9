"""Denoisers in folders of Diffusers' layout and on the Hugging Face hub: saved, loaded, fitted to one's classes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffguard.errors import DataError, DiffGuardError, ServiceError, SettingError
from diffguard.models.denoisers.base import DiffusersDenoiser, LoadOptions, Savable
from diffguard.models.denoisers.dit import TransformerDenoiser
from diffguard.models.denoisers.latent import LatentDenoiser
from diffguard.models.denoisers.patched import PatchedDenoiser
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.models.denoisers.relabeled import LABELS_FILE, RelabeledDenoiser
from diffguard.models.denoisers.scheduler import CONFIG_FILE, open_scheduler
from diffguard.models.denoisers.text import TextDenoiser
from diffguard.settings import ObjectDenoiser, PretrainedDenoiser
from diffguard.utils.atomic import atomic_folder
from diffguard.utils.importing import import_object
from diffguard.utils.text import first_line

CARD_FILE = "README.md"
MOST_CARD_BYTES = 2**20

FAMILIES: list[type[DiffusersDenoiser]] = [
    TransformerDenoiser,
    LatentDenoiser,
    TextDenoiser,
    PatchedDenoiser,
    PixelDenoiser,
]
"""In the order in which they are tried: the first that matches a folder loads it. A new family is a class and a line
here."""


def save_denoiser(denoiser: Any, folder: str | Path) -> None:
    """Write the folder that `load_denoiser` reads, in Diffusers' layout, whole or not at all.

    unet/ (or transformer/) and scheduler/; a latent model also vqvae/ and class_embedder/, or vae/ and,
    prompted, prompts/; README.md if it has a card. Weights that float16 holds as they are are written in it.

    Raises:
        SettingError: it is a custom denoiser without a method save.
        DataError: the folder holds something already.
    """
    if not isinstance(denoiser, Savable):
        raise SettingError(f"denoiser: {type(denoiser).__name__} has no method save(folder)")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise DataError(f"{folder}: there is something already; move it, or name another folder")
    with atomic_folder(folder) as new:
        denoiser.save(new)
        if isinstance(card := getattr(denoiser, "card", None), str):
            (new / CARD_FILE).write_text(card, encoding="utf-8")


def load_denoiser(folder: str | Path, patch: int | None = None) -> Any:
    """Load a denoiser from a folder in Diffusers' layout, or one that `save_denoiser` wrote.

    Its parts tell its kind: a UNet alone works on pixels (its files may lie in the folder itself), with
    vqvae/ and class_embedder/ it is a latent model; transformer/ and vae/ make a diffusion transformer. A
    text-conditioned model needs to know its prompts: see `open_denoiser`.

    Args:
        patch: of a UNet on patches of pixels, their side; None: it follows from its channels (48 are RGB images in
            patches of 4x4, 12 in patches of 2x2).

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
        SettingError: the patch does not follow from the channels, or does not fit them.
    """
    return _load(Path(folder), LoadOptions(patch=patch))


def open_denoiser(spec: PretrainedDenoiser | ObjectDenoiser, classes: Sequence[str]) -> Any:
    """The denoiser that a spec names, for a classifier of these classes.

    Args:
        classes: their names, in the order of the labels.

    Raises:
        DataError: the folder or a part of it is missing, or is not such a model.
        SettingError: it knows fewer or more labels, or one's own code is not a denoiser.
        ServiceError: the hub cannot be reached.
    """
    if isinstance(spec, ObjectDenoiser):
        where, opened = spec.object, _of_object(spec)
    else:
        where, opened = spec.path, _load(_local(spec.path), LoadOptions(spec, list(classes), spec.patch))
    if spec.labels is not None:
        return _relabeled(opened, spec.labels, classes, where)
    if opened.num_labels and opened.num_labels != len(classes):
        raise SettingError(
            f"denoiser {where}: it knows {opened.num_labels} labels, the benchmark has {len(classes)} classes; "
            "give labels: the denoiser's label of each class, in order"
        )
    return opened


def _relabeled(denoiser: Any, labels: Sequence[int], classes: Sequence[Any], where: str) -> RelabeledDenoiser:
    if not denoiser.num_labels:
        raise SettingError(f"denoiser {where}: labels are given, and it takes none")
    if len(labels) != len(classes):
        raise SettingError(f"denoiser {where}: labels: {len(labels)} are given for {len(classes)} classes")
    if wrong := [each for each in labels if not isinstance(each, int) or not 0 <= each < denoiser.num_labels]:
        raise SettingError(f"denoiser {where}: labels: {wrong[0]!r} is not within 0..{denoiser.num_labels - 1}")
    return RelabeledDenoiser(denoiser, labels)


def _of_object(spec: ObjectDenoiser) -> Any:
    factory = import_object(spec.object)
    try:
        made = factory(**spec.arguments)
    except (TypeError, ValueError) as error:
        reason = first_line(error)
        raise SettingError(f"{spec.object}: it cannot be called with {sorted(spec.arguments)} ({reason})") from None
    asked = ("alphas_cumprod", "num_labels", "null_label", "image_shape", "device", "to", "encode", "decode", "eps")
    if lacking := [name for name in asked if not hasattr(made, name)]:
        raise SettingError(f"{spec.object}: it is no denoiser: {type(made).__name__} has no {lacking[0]}")
    return made


def is_id(path: str) -> bool:
    """Whether it is the id of a model on a hub by its form, as in ``facebook/DiT-XL-2-256``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def _local(path: str) -> Path:
    """A model's folder; of a hub id, where the hub's cache has it, downloaded if need be."""
    if Path(path).is_dir():
        return Path(path)
    if not is_id(path):
        raise DataError(f"{path}: no such folder of a denoiser")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(path, safety_checker=None))
    except Exception as error:  # whatever a download raises: of httpx, of the hub
        raise ServiceError(
            f"denoiser {path}: the Hugging Face hub cannot be reached for it ({first_line(error)}); download it "
            "where there is a network, and give its folder as path"
        ) from None


def _card(folder: Path) -> str | None:
    """The card of a folder; None: it has none, or one that is no page of text. A link, to whatever file, is none."""
    path = folder / CARD_FILE
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_CARD_BYTES:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _load(folder: Path, options: LoadOptions) -> Any:
    # Old pixel models have their files in the folder itself.
    places = [folder / "scheduler", folder]
    scheduler_folder = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    if scheduler_folder is None:
        raise DataError(
            f"{folder}: no denoiser here (scheduler/{CONFIG_FILE} is missing); train one, or name its folder"
        )
    try:
        scheduler = open_scheduler(scheduler_folder)
        family = next(family for family in FAMILIES if family.matches(folder, options))
        denoiser = family.load(folder, scheduler, options)
        denoiser.card = _card(folder)
        if options.size not in (None, denoiser.image_shape[1]):
            raise SettingError(f"{folder}: size: this model takes images of {denoiser.image_shape[1]} pixels alone")
        if (folder / LABELS_FILE).is_file():
            labels = json.loads((folder / LABELS_FILE).read_text(encoding="utf-8"))
            return _relabeled(denoiser, labels, labels, str(folder / LABELS_FILE))
        return denoiser
    except DiffGuardError as error:
        raise type(error)(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    except Exception as error:  # whatever Diffusers raises for a folder that is none of its own
        raise DataError(f"{folder}: the denoiser cannot be loaded: {first_line(error)}") from error
