"""CIFAR-10 and its near-OOD images out of their archives, as tensors by split."""

import io
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffguard.images import picture_of, to_tensor

IND, NEAR = "cifar10-jpeg", "tinyimagenet-near-dev"
HELD_CLASSES = 4
"""Of the near-OOD classes in the order of their names each fourth is for validation, the others for test."""

HELD_IMAGES = 24
"""Of the train images in the order of their names each 24th is for calibration and validation."""


@dataclass(frozen=True)
class Split:
    """Images of a split: uint8 [N, 3, 32, 32], int64 labels [N] (-1: OOD), and their names in the archive."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def every(self, count: int) -> "Split":
        """At most so many, evenly spaced, and so of all classes."""
        rows = np.linspace(0, len(self.names) - 1, min(count, len(self.names))).round().astype(int)
        return self.of(rows)

    def of(self, rows: Iterable[int]) -> "Split":
        rows = list(rows)
        return Split(self.images[rows], self.labels[rows], [self.names[row] for row in rows])


def read_splits(folder: Path, each: int) -> dict[str, Split]:
    """The splits train, calibration, validation, test, validation-near and near.

    Args:
        folder: holds the two archives, <name>.tar.xz or unpacked.
        each: the most images of a split but train.
    """
    ind = {part: _read(folder / IND, f"{IND}/{part}/") for part in ("train", "test")}
    near = _read(folder / NEAR, f"{NEAR}/")
    rows = np.arange(len(ind["train"].names))
    held = rows[::HELD_IMAGES]
    classes = {PurePosixPath(name).parts[-2]: 0 for name in near.names}
    validation = set(list(classes)[::HELD_CLASSES])
    is_held = np.array([PurePosixPath(name).parts[-2] in validation for name in near.names])
    return {
        "train": ind["train"].of(rows[rows % HELD_IMAGES != 0]),
        "calibration": ind["train"].of(held[::2]).every(each),
        "validation": ind["train"].of(held[1::2]).every(each),
        "test": ind["test"].every(each),
        "validation-near": near.of(np.flatnonzero(is_held)).every(each),
        "near": near.of(np.flatnonzero(~is_held)).every(each),
    }


def _read(place: Path, prefix: str) -> Split:
    """The images under a prefix, in the order of their names; their label is the number of their folder."""
    contents = dict(sorted(_contents(place, prefix).items()))
    folders = sorted({PurePosixPath(name).parts[-2] for name in contents})
    of_ind = prefix.startswith(IND)
    labels = [folders.index(PurePosixPath(name).parts[-2]) if of_ind else -1 for name in contents]
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_decoded, contents.values(), contents))
    return Split(torch.stack(images), torch.tensor(labels), list(contents))


def _contents(place: Path, prefix: str) -> dict[str, bytes]:
    archive = place.with_name(f"{place.name}.tar.xz")
    if not archive.is_file():
        names = [path for path in place.rglob("*.jpg")]
        found = {str(path.relative_to(place.parent)): path for path in names}
        return {name: path.read_bytes() for name, path in found.items() if name.startswith(prefix)}
    found = {}
    with tarfile.open(archive) as file:
        for member in file:
            name = member.name.removeprefix("./")
            if member.isfile() and name.startswith(prefix) and (content := file.extractfile(member)):
                found[name] = content.read()
    if not found:
        raise SystemExit(f"error: {archive}: it holds nothing under {prefix}")
    return found


def _decoded(content: bytes, name: str) -> Tensor:
    return (to_tensor(picture_of(content, name).convert("RGB")) * 255).round().to(torch.uint8)


def write_made_up(folder: Path, per_class: int) -> None:
    """Archives of the same form with small pictures of colored bars, one colour a class: to rehearse with."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(IND, f"{IND}/{part}/{label}", label) for part in ("train", "test") for label in range(10)]
    parts += [(NEAR, f"{NEAR}/n{label:02d}", 10 + label) for label in range(8)]
    for archive in (IND, NEAR):
        with tarfile.open(folder / f"{archive}.tar.xz", "w:xz") as file:
            for name, place, kind in parts:
                for number in range(per_class if name == archive else 0):
                    pixels = rng.integers(0, 60, (32, 32, 3))
                    pixels[:, (3 * kind) % 32 :][:, :4, kind % 3] += 180
                    buffer = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=75)
                    member = tarfile.TarInfo(f"{place}/{number:04d}.jpg")
                    member.size = buffer.tell()
                    buffer.seek(0)
                    file.addfile(member, buffer)
