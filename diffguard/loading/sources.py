"""Where bundles are copied from: DVC, the Hugging Face hub, and the file systems of fsspec.

Each imports its library when it is asked, so that nobody needs all of them.
"""

import glob
import posixpath
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from diffguard.deploy.bundle import INFO_FILE
from diffguard.errors import DataError, SettingError
from diffguard.serving.limits import MAX_BUNDLE_BYTES, MAX_INFO_BYTES

_CHUNK = 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")


class NoBundleError(DataError):
    """There is no detector.json.

    Attributes:
        is_model: whether the folder is of a model in MLflow's format.
    """

    def __init__(self, message: str, *, is_model: bool = False) -> None:
        super().__init__(message)
        self.is_model = is_model


class Source(Protocol):
    """A place that has a bundle.

    Attributes:
        is_pinned: whether what is there never changes, as at a commit.
    """

    is_pinned: bool

    def open(self) -> None:
        """Reach the place, once, before the first copy. It may raise whatever its library does."""

    def copy(self, names: Collection[str], folder: Path) -> None:
        """Copy files of the bundle into a folder.

        Args:
            names: relative, with slashes; none leads out of the bundle.

        Raises:
            NoBundleError: detector.json is asked for, and not there.
            DataError: they are larger than a bundle may be.
        """


def source_of(uri: str) -> Source:
    """Where a URI leads to; nothing is asked there yet.

    Raises:
        SettingError: it has another form.
    """
    if uri.startswith("dvc://"):
        return DvcSource(uri)
    if uri.startswith("hf://"):
        return HubSource(uri)
    return FsspecSource(uri)


class FsspecSource:
    """A folder's URL of any file system that fsspec knows, or a path in such a file system."""

    is_pinned = False

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.files: Any = None
        self.root = ""

    def open(self) -> None:
        from fsspec.core import url_to_fs

        try:
            self.files, self.root = url_to_fs(self.uri)
        except (ImportError, ValueError) as error:
            raise SettingError(f"{_scheme(self.uri)}: no file system of fsspec that is installed ({error})") from None

    def copy(self, names: Collection[str], folder: Path) -> None:
        most = MAX_INFO_BYTES if set(names) == {INFO_FILE} else MAX_BUNDLE_BYTES
        for name in sorted(names):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                incoming = self.files.open(self._path(name), "rb")
            except FileNotFoundError as error:
                cause = error.__cause__  # fsspec says so of any answer, and of a host that does not answer
                if isinstance(cause, OSError) or getattr(cause, "status", 404) != 404:
                    raise cause from None  # type: ignore[misc]
                if name != INFO_FILE:
                    raise
                raise _no_bundle(is_model=self.files.exists(self._path("MLmodel"))) from None
            with incoming, target.open("wb") as file:
                while chunk := incoming.read(_CHUNK):
                    most -= len(chunk)
                    if most < 0:
                        raise _too_large(names)
                    file.write(chunk)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if self.root else name


class DvcSource(FsspecSource):
    """An artifact or a path of a project that uses DVC: ``dvc://REPOSITORY#NAME@REVISION``."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.repository, _, place = uri.removeprefix("dvc://").rpartition("#")
        self.name, _, self.revision = place.partition("@")
        if not (self.repository and self.name):
            raise SettingError(
                f"{uri}: not of the form dvc://REPOSITORY#NAME@REVISION, such as dvc://../project#detector"
            )
        self.is_pinned = _COMMIT.fullmatch(self.revision) is not None

    def open(self) -> None:
        self.files = self._files(self.revision or None)
        if self.files is None:  # a registered version of an artifact is a tag with its name
            self.files = self._files(f"{self.name}@{self.revision}")
        if self.files is None:
            raise DataError(f"{self.uri}: the repository has no revision {self.revision}")
        self.root = posixpath.join("/", self._artifact() or self.name)

    def _files(self, revision: str | None) -> Any:
        """The repository at a revision, by DVC's own file system of fsspec; None: it has no such revision."""
        import fsspec

        try:
            kind: Any = fsspec.get_filesystem_class("dvc")
        except ImportError:
            raise SettingError(f"{self.uri}: DVC is not installed; run: pip install dvc") from None
        try:
            files = kind(url=self.repository, rev=revision)
            files.repo  # noqa: B018 - opens it
        except Exception as error:  # of whatever class DVC raises, which this library does not know
            if type(error).__name__ != "RevError":
                raise
            return None
        return files

    def _artifact(self) -> str | None:
        """The path of the artifact of that name, from the project's root."""
        for file, artifacts in self.files.repo.artifacts.read().items():
            if self.name in artifacts:
                return posixpath.join(posixpath.dirname(file), str(artifacts[self.name].path))
        return None


class HubSource:
    """A model on the Hugging Face hub, ``hf://owner/name@revision``; HF_ENDPOINT may name another hub."""

    def __init__(self, uri: str) -> None:
        self.repository, _, revision = uri.removeprefix("hf://").partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise SettingError(f"{uri}: not of the form hf://owner/name or hf://owner/name@revision")
        self.revision = revision or None
        self.is_pinned = _COMMIT.fullmatch(revision) is not None
        self.sizes: dict[str, int] = {}

    def open(self) -> None:
        from huggingface_hub import HfApi

        found = HfApi().model_info(self.repository, revision=self.revision, timeout=30, files_metadata=True)
        self.revision = found.sha  # one commit, whatever is pushed meanwhile
        self.sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}

    def copy(self, names: Collection[str], folder: Path) -> None:
        from huggingface_hub import snapshot_download

        if INFO_FILE in names and INFO_FILE not in self.sizes:
            raise _no_bundle()
        most = MAX_INFO_BYTES if set(names) == {INFO_FILE} else MAX_BUNDLE_BYTES
        if sum(self.sizes.get(name, 0) for name in names) > most:
            raise _too_large(names)
        patterns = [glob.escape(name) for name in names]
        snapshot_download(self.repository, revision=self.revision, local_dir=folder, allow_patterns=patterns)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on what it has copied


def _no_bundle(*, is_model: bool = False) -> NoBundleError:
    return NoBundleError(f"no detector there ({INFO_FILE} is missing); name the bundle's own folder", is_model=is_model)


def _too_large(names: Collection[str]) -> DataError:
    if set(names) == {INFO_FILE}:
        return DataError(f"its {INFO_FILE} has more than {MAX_INFO_BYTES:,} bytes; make the bundle anew")
    return DataError(f"it has more than {MAX_BUNDLE_BYTES:,} bytes; copy it yourself, and name the folder")


def _scheme(uri: str) -> str:
    return uri.partition("://")[0] + "://"
