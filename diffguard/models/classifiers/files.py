"""Classifiers of this library in safetensors files; reading one does not run code that the file names."""

import json
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from diffguard.errors import DataError
from diffguard.models.classifiers.small import SmallClassifier
from diffguard.models.weights import give_weights, read_weights
from diffguard.utils.importing import OWN, check_names, current_name, import_object
from diffguard.utils.text import first_line


def save_classifier(classifier: SmallClassifier, path: Path) -> None:
    """Write the weights, and the class and arguments that rebuild the network, to one safetensors file."""
    name = f"diffguard.models.classifiers:{type(classifier).__name__}"
    metadata = {"class": name, "config": json.dumps(classifier.config)}
    save_file({key: value.contiguous() for key, value in classifier.state_dict().items()}, path, metadata)


def load_classifier(path: str | Path, trust: Collection[str] = ()) -> Any:
    """Load a classifier that `save_classifier` wrote, on the CPU, in eval mode and frozen.

    Args:
        trust: code that the file may name in addition to this library's classes; see `diffguard.utils.importing`.

    Raises:
        DataError: the file is missing, damaged, does not fit its class, or names code that is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no classifier here; train one (dvc repro train-classifier), or name its file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        name, config = current_name(metadata["class"]), json.loads(metadata["config"])
        if not isinstance(config, dict):
            raise TypeError("its configuration is not a JSON object")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({first_line(error)})") from error
    check_names([name], path, trust)
    state, factory = read_weights(path), import_object(name)
    largest = max(len(state), *(max(value.shape, default=0) for value in state.values()))
    if too_large := [key for key, value in config.items() if _largest(value) > largest]:
        raise DataError(f"{path}: {too_large[0]}: {config[too_large[0]]} is more than its weights could fill")
    try:
        # Without memory for weights, which a damaged configuration could demand without limit.
        with torch.device("meta") if name in OWN else nullcontext():
            classifier = factory(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({first_line(error)})") from error
    if name in OWN and (wrong := [key for key, value in config.items() if not _is_numeric(value)]):
        raise DataError(f"{path}: {wrong[0]}: {config[wrong[0]]!r} is not a number")
    if not isinstance(classifier, nn.Module):
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({name} returns no torch.nn.Module)")
    give_weights(classifier, state, path, name.rpartition(":")[2])
    return classifier.eval().requires_grad_(False)


def _is_numeric(value: Any) -> bool:
    """Whether a value of a configuration is a number, or a list of numbers."""
    return all(isinstance(number, int | float) for number in (value if isinstance(value, list) else [value]))


def _largest(value: Any) -> float:
    """The largest number in a value of a configuration, or the length of a list if that is larger."""
    if isinstance(value, list):
        return max([float(len(value)), *map(_largest, value)])
    return float(value) if isinstance(value, int | float) else 0.0
