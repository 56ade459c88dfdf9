"""Folders that are there whole or not at all."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2: paths from the working folder, and that both change places."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside this one, which takes its place when the block ends without an error.

    A folder that is there already is replaced: where the system can, at once, so that there is always one. After an
    error it is as it was, and nothing is left beside it. A link stays, and what it leads to is replaced. Everybody may
    read it: an endpoint that serves it may run as another user.

    Yields:
        The new folder, empty.

    Raises:
        OSError: nothing can be written there, or it is a file.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        new.chmod(0o755)
        yield new
        for file in new.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(file.stat().st_mode | 0o644)  # safetensors lets its owner alone read a file
        if folder.exists():
            _exchange(new, folder)
        else:
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change places."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        exchanged = False
    else:
        exchanged = rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0
    if exchanged:
        return
    aside = new.with_name(f"{new.name}-old")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
