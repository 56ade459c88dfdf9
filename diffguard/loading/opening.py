"""`open_detector`: a detector by a folder or a URI."""

import re
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from diffguard.deploy.bundle import hash_bundle, load_bundle
from diffguard.deploy.detector import DeployedDetector
from diffguard.errors import DataError, SettingError
from diffguard.loading.cache import cached_bundle, shown
from diffguard.loading.sources import NoBundleError, source_of

_MODELS = ("models:/", "runs:/", "mlflow-artifacts:/")
"""What MLflow alone reads."""


def open_detector(
    uri: str | Path, device: torch.device | str | None = None, trust: Collection[str] = ()
) -> DeployedDetector:
    """Open the detector in a bundle's folder, or of that name elsewhere.

    What is not on this machine is copied into the cache first (`diffguard.loading.cache`), and checked against the
    hashes in its detector.json before any of it is opened.

    Args:
        uri: one of

            - a folder, or ``file:///folder``;
            - ``models:/name@alias``, ``models:/name/version`` or ``runs:/id/name``, read from the store of MLflow that
              MLFLOW_TRACKING_URI names;
            - ``dvc://REPOSITORY#NAME@REVISION``: of a project that uses DVC, the artifact of that name in its dvc.yaml,
              or a path. The repository is a folder or a URL of Git. The revision is a commit, tag, branch or, of an
              artifact, a registered version; without it, the default branch (of a folder, what is checked out);
            - ``hf://owner/name@revision`` on the Hugging Face hub; the revision may be left out;
            - a folder's URL of any file system of fsspec that is installed: ``s3://bucket/folder``,
              ``https://host/folder``, ``zip://folder::https://host/file.zip``, …

            All but MLflow's may end with ``?sha256=`` and the SHA-256 of detector.json, which it must have.
        device, trust: see `load_bundle`; for a model in MLflow, the code that it was logged with is trusted too.

    Raises:
        DataError: the bundle is missing, damaged, not that of the hash, too large, or names code that is not trusted;
            see `load_bundle`.
        SettingError: the URI has another form, or what reads it is not installed.
        ServiceError: the place cannot be reached or does not have it.
    """
    text = str(uri)
    if text.startswith(_MODELS):
        return _of_mlflow(text, device, trust)
    if "://" not in text:
        return load_bundle(uri, device, trust=trust)
    text, expected = _split_hash(text)
    if re.match(r"file://[^:]*$", text):
        return _of_folder(text, expected, device, trust)
    try:
        folder = cached_bundle(text, source_of(text), expected)
    except NoBundleError as error:
        if error.is_model and expected is None:
            return _of_mlflow(text, device, trust)
        raise
    return load_bundle(folder, device, bundle_hash=folder.name, trust=trust)


def _split_hash(uri: str) -> tuple[str, str | None]:
    """Split ``?sha256=…`` off.

    Raises:
        SettingError: it is no SHA-256.
    """
    place, mark, value = uri.partition("?sha256=")
    if mark and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise SettingError(f"{shown(uri)}: what follows ?sha256= is not the 64 hexadecimal digits of a SHA-256")
    return place, value.lower() if mark else None


def _of_folder(
    uri: str, expected: str | None, device: torch.device | str | None, trust: Collection[str]
) -> DeployedDetector:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise SettingError(f"{uri}: a file of another machine; write file:///folder with three slashes")
    folder = Path(unquote(parts.path))
    if expected is None and (folder / "MLmodel").is_file():
        return _of_mlflow(uri, device, trust)
    if expected is not None and (found := hash_bundle(folder)) != expected:
        raise DataError(f"{uri}: its detector.json has the SHA-256 {found}, not {expected}; another detector is there")
    return load_bundle(folder, device, bundle_hash=expected, trust=trust)


def _of_mlflow(uri: str, device: torch.device | str | None, trust: Collection[str]) -> DeployedDetector:
    try:
        from diffguard import mlflow
    except ImportError:
        raise SettingError(f"{uri}: MLflow is not installed; run: pip install 'diffguard-ood[mlflow]'") from None
    return mlflow.open_model(uri, device, trust)
