"""Atomic writes, local or to an fsspec URL, and checked reads of JSON, tables and images."""

import hashlib
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from PIL import Image
from upath import UPath

from diffguard.errors import DataError, SettingError
from diffguard.images import to_tensor
from diffguard.utils.hashing import hash_file
from diffguard.utils.text import first_line, read_text

if TYPE_CHECKING:
    import torch


def place(url: str | Path) -> Path:
    """A local path, or that of an fsspec URL (s3://bucket/folder, memory://folder, …).

    Raises:
        SettingError: no fsspec file system answers to the URL.
    """
    text = str(url).removeprefix("file://")
    if "://" not in text:
        return Path(text)
    try:
        return cast(Path, UPath(text))
    except (ValueError, ImportError) as error:
        raise SettingError(f"{url}: not a place that fsspec knows ({error})") from None


def is_local(path: Path) -> bool:
    """Whether a path is of this machine's file system."""
    return isinstance(path, Path)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary local path, then move what it wrote into place at once.

    Raises:
        DataError: a local disk does not take it; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}"
    if is_local(path):
        temporary = path.with_name(name)
        try:
            write(temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or first_line(error)}); make room") from None
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        remote, beside = UPath(path), UPath(path).with_name(name)
        # An object store's own move makes the object appear at once; elsewhere it is a rename.
        remote.fs.put_file(str(Path(folder) / name), beside.path)
        remote.fs.mv(beside.path, remote.path)


def fetched(path: Path) -> Path:
    """A local copy of a file or folder; a local path is returned as it is. Copies are kept by content."""
    if is_local(path):
        return path
    copy = Path(tempfile.gettempdir()) / "diffguard" / hash_file(path)[:20] / path.name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{os.getpid()}-{threading.get_ident()}")
        UPath(path).fs.get(UPath(path).path, str(partial), recursive=path.is_dir())
        # Another process may have been quicker.
        if not copy.exists():
            os.replace(partial, copy)
    return copy


def write_json(path: Path, values: Any) -> None:
    """Write values as readable JSON."""
    write_whole(path, lambda target: target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path, remedy: str) -> Any:
    """Read JSON; a missing file is an error that says what makes it."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({first_line(error)}); {remedy or 'remove it'}") from None


def read_manifest(path: Path) -> pd.DataFrame:
    """The manifest of a benchmark, in the order of its ids."""
    if not path.is_file():
        raise DataError(f"{path}: no manifest; make it by: dvc repro prepare")
    with path.open("rb") as file:
        manifest = pd.read_parquet(file)
    if "origin" not in manifest:
        raise DataError(f"{path}: made by an older version; make it again by: dvc repro prepare")
    return manifest


def read_table(path: Path) -> pd.DataFrame:
    """A Parquet file.

    Raises:
        DataError: it is missing, or not a Parquet file.
    """
    try:
        with path.open("rb") as file:
            return pd.read_parquet(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file ({first_line(error)})") from None


def read_image(root: Path, path: str, recorded: str) -> "torch.Tensor":
    """An image of a manifest as [C, H, W] in [0, 1].

    Args:
        path, recorded: of the manifest's row, its file and content hash.

    Raises:
        DataError: the file is missing or unreadable, or is not what the manifest recorded.
    """
    try:
        content = (root / path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            tensor = to_tensor(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{root / path}: the image cannot be read ({error})") from None
    if hashlib.sha256(content).hexdigest() != recorded:
        raise DataError(f"{root / path}: not the image that the manifest recorded; run: dvc repro prepare --force")
    return tensor


def read_images(root: Path, manifest: pd.DataFrame) -> "torch.Tensor":
    """The images of a manifest's rows as [N, C, H, W] in [0, 1]; see `read_image`."""
    import torch

    pairs = zip(manifest["path"], manifest["content_hash"], strict=True)
    return torch.stack([read_image(root, path, recorded) for path, recorded in pairs])


def read_image_bytes(root: Path, manifest: pd.DataFrame) -> "torch.Tensor":
    """The images of a manifest's rows as uint8 [N, C, H, W], a quarter of what floats take; see `read_image`."""
    import torch

    images = torch.empty(0, dtype=torch.uint8)
    for number, (path, recorded) in enumerate(zip(manifest["path"], manifest["content_hash"], strict=True)):
        image = (read_image(root, path, recorded) * 255).round().to(torch.uint8)
        if not number:
            images = torch.empty((len(manifest), *image.shape), dtype=torch.uint8)
        images[number] = image
    return images


def note_use(path: Path) -> None:
    """Let `tasks.clean`, which removes what no run has used for long, see that this one is in use: by its time.

    At most once a day, since what was read of a file or folder is read again when its time is another.
    """
    if time.time() - path.stat().st_mtime > 24 * 3600:
        os.utime(path)
