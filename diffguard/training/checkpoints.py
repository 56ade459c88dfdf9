"""Checkpoints from which training resumes."""

import os
from pathlib import Path
from typing import Any

import torch

from diffguard.errors import DataError


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; an existing one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    torch.save(state, partial)
    os.replace(partial, path)


def read_checkpoint(path: Path, begun_with: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint that `write_checkpoint` wrote.

    Args:
        begun_with: values (settings, seed, ...) with which the checkpoint's training must have begun.

    Raises:
        DataError: the checkpoint is damaged, or its training was begun with other values.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        recorded = state["begun_with"]
    except Exception as error:  # torch.load raises any kind of exception on a damaged file
        raise DataError(f"{path}: not a checkpoint of a training ({type(error).__name__}); remove it") from None
    for key, value in begun_with.items():
        if recorded.get(key) != value:
            raise DataError(f"{path}: this training was begun with other {key}; remove the file to start again")
    return state
