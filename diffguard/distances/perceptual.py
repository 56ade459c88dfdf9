"""DISTS and LPIPS with their weights: from torch's hub cache, a download, or a folder of one's own."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from diffguard.errors import DataError

WEIGHTS_VARIABLE = "DIFFGUARD_WEIGHTS"
"""Environment variable: the folder of the weight files, in place of torch's hub cache."""

_PIQ = "https://github.com/photosynthesis-team"
URLS = {
    "lpips": (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        f"{_PIQ}/photosynthesis.metrics/releases/download/v0.4.0/lpips_weights.pt",
    ),
    "dists": (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        f"{_PIQ}/piq/releases/download/v0.4.1/dists_weights.pt",
    ),
}
"""What each network is made of, under the names that torch's hub gives the files."""


def load(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """piq's DISTS or LPIPS, giving one distance an image. Loaded once a process and folder.

    Weights come from the folder in the environment variable DIFFGUARD_WEIGHTS where it is set, else
    from torch's hub cache, else they are downloaded there.

    Raises:
        DataError: a weight file is missing or damaged and cannot be downloaded; says where to put what.
    """
    return _load(name, torch.device(device), os.environ.get(WEIGHTS_VARIABLE))


@lru_cache(maxsize=8)
def _load(name: str, device: torch.device, folder: str | None) -> nn.Module:
    import piq

    where = Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints"
    missing = [url for url in URLS[name] if not (where / url.rsplit("/", 1)[1]).is_file()]
    if folder and missing:
        raise DataError(_advice(name, where, "are missing", missing))
    make: Any = {"lpips": piq.LPIPS, "dists": piq.DISTS}[name]
    try:
        with _hub(where if folder else None):
            network: nn.Module = make(reduction="none")
    except (URLError, OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(_advice(name, where, f"cannot be loaded ({reason})", missing or URLS[name])) from None
    return network.to(device).eval().requires_grad_(False)


def _advice(name: str, where: Path, what: str, urls: Any) -> str:
    return (
        f"distance: the weights of {name} {what}; download {' and '.join(urls)} into {where}, "
        f"or name a folder that has them in {WEIGHTS_VARIABLE}"
    )


@contextmanager
def _hub(folder: Path | None) -> Iterator[None]:
    """torch's hub, reading its files from this folder."""
    if folder is None:
        yield
        return
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / "checkpoints").symlink_to(folder.resolve())
        torch.hub.set_dir(cache)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
