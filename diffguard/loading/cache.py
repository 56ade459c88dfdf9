"""The folder of copies of detectors that are elsewhere: ``<cache>/detectors/<name>-<hash of the URI>/<SHA-256>``.

The last part is the SHA-256 of detector.json, which holds those of all other files: a copy never changes. A URI that
says which content it means, by ``?sha256=`` or a commit, is answered by its copy, without a network. For another one
the place is asked each time, since something new may be there; if it cannot be reached, that is an error, and never an
old copy in silence.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path

from diffguard.deploy.bundle import INFO_FILE, check_bundle, hash_bundle, recorded_files
from diffguard.errors import DataError, DiffGuardError, ServiceError
from diffguard.loading.sources import NoBundleError, Source
from diffguard.serving.limits import MAX_BUNDLE_FILES
from diffguard.utils.atomic import atomic_folder
from diffguard.utils.text import first_line

VARIABLE = "DIFFGUARD_CACHE"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of what is written here, not of the place."""


def cache_folder() -> Path:
    """Where copies are: DIFFGUARD_CACHE, or the user's folder for caches (~/.cache/diffguard)."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else user_cache_path("diffguard", appauthor=False)


def cached_bundle(uri: str, source: Source, expected: str | None = None) -> Path:
    """Return the folder of a whole copy, whose name is the SHA-256 of its detector.json; it is made if there is none.

    Args:
        uri: what the copy is named by.
        expected: SHA-256 that detector.json must have; None: any.

    Raises:
        NoBundleError: there is no detector.json at the place.
        DataError: it is damaged, too large or not that of the hash; or the cache cannot be written.
        SettingError: what reads the place is not installed.
        ServiceError: the place cannot be reached.
    """
    copies = cache_folder() / "detectors" / _name(uri)
    if expected or source.is_pinned:
        for copy in _copies(copies):
            if expected in (None, copy.name) and _is_whole(copy):
                return copy
    try:
        source.open()
        return _copied(uri, source, copies, expected)
    except DiffGuardError as error:
        message = shown(error)
        message = message if message.startswith(shown(uri)) else f"{shown(uri)}: {message}"
        if isinstance(error, NoBundleError):
            raise NoBundleError(message, is_model=error.is_model) from None
        raise type(error)(message) from None
    except Exception as error:  # of any kind, as the library that reads the place raises it
        reason = shown(first_line(error))
        raise ServiceError(f"{shown(uri)}: cannot be read ({reason}){_offline(uri, copies)}") from None


def shown(text: object) -> str:
    """Text for a message, without the user and password that a URL in it may have.

    Example:
        >>> shown("https://me:secret@example.org/detector")
        'https://…@example.org/detector'
    """
    return re.sub(r"(?<=://)[^/@\s]*@", "…@", str(text))


def _name(uri: str) -> str:
    last = re.split(r"[/#]", uri.partition("::")[0].rstrip("/"))[-1]
    return f"{re.findall(r'^[A-Za-z0-9_.-]*', last)[0]}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def _copies(folder: Path) -> list[Path]:
    """The copies that are there, the latest first."""
    copies = [each for each in folder.glob("[0-9a-f]*") if (each / INFO_FILE).is_file()]
    return sorted(copies, key=lambda each: (each / INFO_FILE).stat().st_mtime, reverse=True)


def _is_whole(copy: Path) -> bool:
    try:
        check_bundle(copy)
        return hash_bundle(copy) == copy.name
    except DataError:
        return False


def _copied(uri: str, source: Source, copies: Path, expected: str | None) -> Path:
    try:
        copies.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copies, prefix=".") as first:
            source.copy([INFO_FILE], Path(first))
            found = hash_bundle(first)
            if expected not in (None, found):
                raise DataError(f"its {INFO_FILE} has the SHA-256 {found}, not {expected}; another detector is there")
            copy = copies / found
            if _is_whole(copy):
                return copy
            with atomic_folder(copy) as new, _named(new, uri):
                shutil.copyfile(Path(first, INFO_FILE), new / INFO_FILE)
                names = recorded_files(new)
                if len(names) > MAX_BUNDLE_FILES:
                    raise DataError(
                        f"it has more than {MAX_BUNDLE_FILES:,} files; copy it yourself, and name the folder"
                    )
                source.copy(names, new)
                check_bundle(new)
            return copy
    except OSError as error:
        if error.errno not in _LOCAL and not (error.filename and str(cache_folder()) in str(error.filename)):
            raise
        reason = error.strerror or error
        raise DataError(
            f"{cache_folder()}: cannot be written ({reason}); make room, or set {VARIABLE} to another folder"
        ) from None
    finally:
        with suppress(OSError):
            copies.rmdir()  # if nothing came of it


@contextmanager
def _named(folder: Path, uri: str) -> Iterator[None]:
    """Let errors name the place and not the folder that it is copied into, which will be gone."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(str(folder), shown(uri))) from None


def _offline(uri: str, copies: Path) -> str:
    """What to do where the place cannot be reached."""
    for copy in _copies(copies)[:1]:
        return f"; to use the last copy of it that is in the cache, name its content: {shown(uri)}?sha256={copy.name}"
    return ""
