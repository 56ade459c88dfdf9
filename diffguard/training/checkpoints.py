"""Files from which a training goes on."""

import os
from pathlib import Path
from typing import Any

import torch

from diffguard.errors import DataError


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write it whole or not at all; one that is there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)


def read_checkpoint(path: Path, begun_with: dict[str, Any]) -> dict[str, Any]:
    """What `write_checkpoint` wrote.

    Args:
        begun_with: what it has to agree with.

    Raises:
        DataError: it is damaged, or of another training.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        recorded = state["begun_with"]
    except Exception as error:  # whatever torch.load raises for a damaged file
        raise DataError(f"{path}: not a checkpoint of a training ({type(error).__name__}); remove it") from None
    for key, value in begun_with.items():
        if recorded.get(key) != value:
            raise DataError(f"{path}: this training was begun with other {key}; remove the file to begin anew")
    return state
