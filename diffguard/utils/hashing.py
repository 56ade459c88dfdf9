"""Hashes of files, settings and code."""

import hashlib
import inspect
import json
import sys
from collections.abc import Hashable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffguard.errors import DataError


def hash_file(path: Path, without: str | None = None) -> str:
    """Return the SHA-256 of a file, or of a folder's relative names and contents, in hexadecimal.

    Args:
        without: name of a file of the folder itself that does not count.

    Raises:
        DataError: there is no such file or folder.
    """
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
    return hash_values({name: hash_file(file) for name, file in files.items() if name != without})


def file_state(path: Path) -> Hashable:
    """What changes whenever a local file does, or any file of a folder; None: nothing is there.

    Of each file its relative name, size, inode, and the times of change of its content and of its entry: a copy
    that keeps the old time is seen too. Two equal states mean equal contents, unless somebody writes into a file in
    place, without changing its size, twice within a tick of the file system's clock (milliseconds).
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        files = [path]
    else:
        return None
    states = []
    for file in files:
        with suppress(FileNotFoundError):  # gone meanwhile
            stat = file.stat()
            name = str(file.relative_to(path))
            states.append((name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(states)


def hash_unchanged(path: Path, without: str | None = None) -> str:
    """`hash_file`, which a process reads once for as long as the file or folder stays as it is.

    The hash is kept by the path and by `file_state`, so what was written anew is read anew. What is behind a URL has
    no such state and is always read. Not for what is checked against a recorded hash: that has to be read.
    """
    return _hash_in_state(path, without, file_state(path)) if isinstance(path, Path) else hash_file(path, without)


@lru_cache(maxsize=256)
def _hash_in_state(path: Path, without: str | None, state: Hashable) -> str:
    return hash_file(path, without)


def hash_values(values: Any) -> str:
    """Return the SHA-256 of plain values (what JSON holds) in canonical form, in hexadecimal."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_code(name: str) -> str:
    """Return the SHA-256 of the source of ``package.module:name``: of the module, and of the file that defines it.

    Code that these import is not included. For DiffGuard's own code the hash is constant: METHOD_VERSION stands for it.

    Raises:
        SettingError: the object cannot be imported.
    """
    from diffguard.utils.importing import import_object

    module, value = name.partition(":")[0], import_object(name)
    if module.partition(".")[0] == "diffguard":
        return hash_values([])
    files = {getattr(sys.modules[module], "__file__", None)}
    with suppress(TypeError):  # an object without source, such as a partial function
        files.add(inspect.getsourcefile(value))
    return hash_values(sorted(hash_file(Path(file)) for file in files if file is not None))
