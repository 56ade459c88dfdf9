"""Files that are whole or absent, and the hashes that tell them apart."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from diffguard.errors import DataError

if TYPE_CHECKING:
    import torch


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside the target, then move it into place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write values as readable JSON."""
    write_whole(path, lambda target: target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path, remedy: str) -> Any:
    """Read JSON; a missing file is an error that says what makes it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {remedy}") from None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents, in hexadecimal."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    parts = {str(each.relative_to(path)): hash_file(each) for each in sorted(path.rglob("*")) if each.is_file()}
    return hash_values(parts)


def hash_values(values: Any) -> str:
    """SHA-256 of plain values, written one way only, in hexadecimal."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> pd.DataFrame:
    """The manifest of a benchmark, in the order of its ids."""
    if not path.is_file():
        raise DataError(f"{path}: no manifest; make it by: dvc repro prepare")
    return pd.read_parquet(path)


def read_images(root: Path, manifest: pd.DataFrame) -> "torch.Tensor":
    """The images of a manifest's rows as [N, C, H, W] in [0, 1].

    Raises:
        DataError: a file is missing or unreadable, or is not what the manifest recorded.
    """
    import torch

    images = []
    for path, recorded in zip(manifest["path"], manifest["content_hash"], strict=True):
        try:
            with Image.open(root / path) as image:
                pixels = np.asarray(image)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{root / path}: the image cannot be read ({error})") from None
        if hash_file(root / path) != recorded:
            raise DataError(f"{root / path}: not the image that the manifest recorded; run: dvc repro prepare --force")
        images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images)).float() / 255
