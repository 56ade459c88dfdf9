"""After the project's folder was renamed or copied: mlflow.db is told where its artifacts are now.

    python -m tasks.services.moved

MLflow keeps the place of an experiment's artifacts as a whole path, and would go on writing to the old one.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

from diffguard.errors import DataError
from tasks.common.console import run_stage
from tasks.config import project

PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Columns of MLflow's store that hold the place of artifacts."""


def local_folder(uri: str | None) -> Path | None:
    """The folder of a file URI, or of a plain path; None: it is elsewhere.

    Example:
        >>> str(local_folder("file:///srv/my%20project/mlruns")), local_folder("s3://bucket/runs")
        ('/srv/my project/mlruns', None)
    """
    if not uri:
        return None
    parts = urlparse(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if parts.scheme == "" else None


def move(database: Path, new: Path) -> int:
    """Let every place in a store begin with a new folder, where it was in an old one of the same name.

    Args:
        new: where the artifacts are, ``mlruns`` of the project.

    Returns:
        How many places were changed.

    Raises:
        DataError: there is no such store.
    """
    if not database.is_file():
        raise DataError(f"{database}: no such store; nothing was logged in this project yet")
    changed = 0
    with closing(sqlite3.connect(database)) as store, store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        old = {
            uri.rstrip("/")
            for (uri,) in store.execute("SELECT artifact_location FROM experiments")
            if (folder := local_folder(uri)) is not None and folder.name == new.name and folder != new
        }
        for table, columns in PLACES.items():
            for column in columns if table in tables else ():
                for uri in old:
                    changed += store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (new.as_uri(), len(uri) + 1, uri, len(uri) + 1, f"{uri}/"),
                    ).rowcount
    return changed


def main() -> None:
    root = project.ROOT
    print(f"{move(root / 'mlflow.db', root / 'mlruns')} places in mlflow.db are now under {root / 'mlruns'}")


if __name__ == "__main__":
    run_stage(main)
