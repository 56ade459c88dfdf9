"""A model's folder: the model itself, or a reference to where it comes from, with the hash of its weights."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.classifiers.loading import open_classifier
from diffguard.models.classifiers.small import SmallClassifier
from diffguard.models.classifiers.wrapped import NetworkClassifier
from diffguard.models.denoisers.base import Savable, networks_of
from diffguard.models.denoisers.loading import CARD_FILE, is_id, load_denoiser, open_denoiser, save_denoiser
from diffguard.settings import (
    ClassifierSpec,
    DenoiserSpec,
    LibraryClassifier,
    ObjectClassifier,
    ObjectDenoiser,
    PretrainedDenoiser,
    parse_settings,
)
from diffguard.utils.hashing import hash_code, hash_unchanged, hash_values
from diffguard.utils.importing import check_names, is_known
from diffguard.utils.text import first_line

CLASSIFIER_FILE = "model.safetensors"
REFERENCE_FILE = "reference.json"
WEIGHTS_FILE = "weights.safetensors"
HASH_FILE = "hash.txt"
"""In a copy for other machines: the hash of the folder that it is a copy of."""


def open_spec(spec: Any, classes: Sequence[str], size: int) -> Any:
    """The classifier or denoiser from elsewhere that a spec names, opened.

    Args:
        classes: names of the labels.
        size: side of the images in pixels.
    """
    if isinstance(spec, PretrainedDenoiser | ObjectDenoiser):
        return open_denoiser(spec, classes)
    return open_classifier(spec, size)


def write_reference(folder: Path, spec: Any, opened: Any) -> None:
    """Note where a model comes from, and the hash of its weights."""
    noted = {"spec": spec.model_dump(mode="json"), "weights": hash_weights(opened)}
    (folder / REFERENCE_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def read_reference(folder: Path) -> Any:
    """The spec that a folder refers to; None: the model is there itself."""
    path = folder / REFERENCE_FILE
    return _spec(_noted(path), path) if path.is_file() else None


def check_reference(folder: Path, trust: Collection[str] = ()) -> None:
    """See that a model's folder names nothing outside of itself: no file, and no code that is not trusted.

    Args:
        trust: see `diffguard.utils.importing.check_names`.

    Raises:
        DataError: it does.
    """
    path, spec = folder / REFERENCE_FILE, read_reference(folder)
    if isinstance(spec, ObjectClassifier | ObjectDenoiser):
        if is_known(spec.object):  # such a model is in its folder itself, or is none
            raise DataError(f"{path}: object: {spec.object} is no model that is referred to; make the bundle anew")
        check_names([spec.object], path, trust)
    for key in ("weights", "path"):
        named = getattr(spec, key, None)
        if named is None or (key == "weights" and named == WEIGHTS_FILE and (folder / WEIGHTS_FILE).is_file()):
            continue
        if key == "weights" or not isinstance(spec, PretrainedDenoiser) or not is_id(named) or Path(named).exists():
            raise DataError(f"{path}: {key}: {named!r} is not a file of this folder; make the bundle anew")
    if isinstance(spec, LibraryClassifier) and (wrong := sorted(_OPENING & spec.arguments.keys())):
        raise DataError(f"{path}: arguments: {wrong[0]} opens another file, and only this folder's are opened")


_OPENING = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained", "weights"}
"""Arguments of timm's and torchvision's builders that name files and addresses."""


def hash_model(folder: Path, trust: Collection[str] = ()) -> str:
    """A hash of a model's folder, the same of its copies on other machines; one's own code counts, and a card does not.

    A process reads the folder once, until it changes: see `diffguard.utils.hashing.hash_unchanged`.

    Args:
        trust: code that the folder may refer to; see `diffguard.utils.importing.check_names`.

    Raises:
        DataError: there is no such folder, or it refers to code that is not trusted.
        SettingError: the code that it refers to cannot be imported.
    """
    if (folder / HASH_FILE).is_file():
        return (folder / HASH_FILE).read_text(encoding="utf-8")
    spec = read_reference(folder)
    if not isinstance(spec, ObjectClassifier | ObjectDenoiser):
        return hash_unchanged(folder, CARD_FILE)
    check_names([spec.object], folder / REFERENCE_FILE, trust)
    return hash_values([hash_unchanged(folder, CARD_FILE), hash_code(spec.object)])


def open_model(folder: Path, classes: Sequence[str], size: int, trust: Collection[str] = ()) -> Any:
    """The model of a folder, on the CPU.

    Args:
        classes, size: see `open_spec`.
        trust: code that the folder may refer to; see `diffguard.utils.importing.check_names`.

    Raises:
        DataError: it is missing, refers to code that is not trusted, or to what has other weights by now.
    """
    if (folder / CLASSIFIER_FILE).is_file():
        return load_classifier(folder / CLASSIFIER_FILE, trust)
    path = folder / REFERENCE_FILE
    if not path.is_file():
        return load_denoiser(folder)
    noted = _noted(path)
    spec = _spec(noted, path)
    if isinstance(spec, ObjectClassifier | ObjectDenoiser):
        check_names([spec.object], path, trust)
    if (folder / WEIGHTS_FILE).is_file():
        spec = spec.model_copy(update={"weights": str(folder / WEIGHTS_FILE)})
    opened = open_spec(spec, classes, size)
    if hash_weights(opened) != noted["weights"]:
        raise DataError(
            f"{folder}: the weights that it refers to have changed since; delete this folder and run again "
            "(code that draws them at random needs a file of weights)"
        )
    return opened


def save_model(model: Any, spec: Any, folder: Path) -> None:
    """Write a folder that another machine can open: what this machine's files hold goes along.

    A classifier or denoiser of ours is written itself. Of a network of a library, of a hub or of one's own
    code a reference is kept, with the weights if they came from a local file.

    Args:
        spec: where the model comes from; None: it was trained here.

    Raises:
        SettingError: it is neither a model of ours, nor is there a spec.
    """
    if isinstance(model, SmallClassifier):
        folder.mkdir(parents=True)
        save_classifier(model, folder / CLASSIFIER_FILE)
        return
    on_a_hub = isinstance(spec, PretrainedDenoiser) and not Path(spec.path).is_dir()
    if isinstance(model, Savable) and not on_a_hub and not isinstance(spec, ObjectDenoiser):
        save_denoiser(model, folder)
        return
    if spec is None:
        raise SettingError(
            f"{type(model).__name__}: it cannot be stored; give the spec of diffguard.settings that opens it again"
        )
    folder.mkdir(parents=True)
    if getattr(spec, "weights", None) is not None:
        network: nn.Module = model.network if isinstance(model, NetworkClassifier) else model
        # Shared tensors are written twice; safetensors takes no others.
        state = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)
        spec = spec.model_copy(update={"weights": WEIGHTS_FILE})
    write_reference(folder, spec, model)


def _noted(path: Path) -> dict[str, Any]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(noted["weights"], str) or not isinstance(noted["spec"]["kind"], str):
            raise TypeError("spec and weights are not what they should be")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a reference to a model ({first_line(error)})") from None
    return dict(noted)


def _spec(noted: dict[str, Any], path: Path) -> Any:
    kind: Any = DenoiserSpec if noted["spec"]["kind"] == "pretrained" or "labels" in noted["spec"] else ClassifierSpec
    return parse_settings(kind, noted["spec"], str(path))


def hash_weights(model: Any) -> str:
    """A hash of the weights of a classifier, or of a denoiser's networks."""
    networks = {"": model} if isinstance(model, nn.Module) else networks_of(model)
    digests = {}
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            # As bytes, for the types that NumPy does not know.
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[f"{name}.{key}"] = hashlib.sha256(content).hexdigest()
    return hash_values(digests)
