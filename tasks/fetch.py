"""Stage fetch: what a benchmark downloads, checked against its SHA-256 and unpacked."""

import argparse
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from diffguard.errors import DataError, ServiceError
from diffguard.utils.text import first_line
from tasks.common.console import run_stage
from tasks.config.benchmark import Download


def fetch(name: str, download: Download, folder: Path) -> Path:
    """Bring one download to a folder, unless it is there; returns its path.

    Raises:
        ServiceError: the address cannot be reached. DataError: it has another content.
    """
    import pooch

    target, note = folder / name, _note(folder, name)
    if is_fetched(name, download, folder):
        return target
    partial = folder / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)
    file = download.url.rstrip("/").rsplit("/", 1)[-1]
    try:
        pooch.retrieve(download.url, known_hash=f"sha256:{download.sha256}", fname=file, path=partial, progressbar=True)
    except ValueError as error:
        reason = first_line(error)
        raise DataError(f"downloads.{name}: {download.url} is not what the benchmark file says ({reason})") from None
    except OSError as error:
        reason = first_line(error)
        raise ServiceError(
            f"downloads.{name}: {download.url} cannot be fetched ({reason}); bring its content to {target} by other "
            f"means, and write {download.sha256} into {note}"
        ) from None
    if download.unpack != "none":
        _unpack(partial / file, download.unpack, f"downloads.{name}: {download.url}")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    note.write_text(download.sha256 + "\n")
    return target


def _unpack(file: Path, kind: str, where: str) -> None:
    """Unpack an archive beside itself, and remove it. Nothing of it lands outside of its folder."""
    try:
        if kind == "tar":
            with tarfile.open(file) as archive:
                archive.extractall(file.parent, filter=_within_room(file.parent))
        else:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    _check_member(member)
                _check_room(sum(member.file_size for member in archive.infolist()), shutil.disk_usage(file.parent).free)
                archive.extractall(file.parent)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{where} cannot be unpacked as {kind} ({first_line(error)})") from None
    file.unlink()


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raise a BadZipFile if a member would land outside of the folder, or is a link."""
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise zipfile.BadZipFile(f"{member.filename!r} would land outside of the folder")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise zipfile.BadZipFile(f"{member.filename!r} is a link")


def _within_room(folder: Path) -> Callable[[tarfile.TarInfo, str], tarfile.TarInfo | None]:
    """tarfile's filter "data", which also ends where what the members say they hold does not fit on the disk."""
    free, claimed = shutil.disk_usage(folder).free, 0

    def within(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        nonlocal claimed
        claimed += member.size
        _check_room(claimed, free)
        return tarfile.data_filter(member, path)

    return within


def _check_room(size: int, free: int) -> None:
    """Raise an OSError if what an archive says it holds does not fit on the disk."""
    if size > free:
        raise OSError(f"it holds {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free")


def is_fetched(name: str, download: Download, folder: Path) -> bool:
    """Whether `fetch` has nothing to do."""
    note = _note(folder, name)
    return (folder / name).is_dir() and note.is_file() and note.read_text().strip() == download.sha256


def _note(folder: Path, name: str) -> Path:
    return folder / f"{name}.sha256"


def fetch_all(downloads: dict[str, Download], folder: Path) -> None:
    """Bring all of a benchmark's downloads to a folder, which is created even if there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, download in downloads.items():
        fetch(name, download, folder)


def main() -> None:
    from tasks.config import project
    from tasks.config.benchmark import load_benchmark
    from tasks.config.params import load_params

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benchmark", help="a file of data/benchmarks/; params.yaml's if not given")
    benchmark = load_benchmark(parser.parse_args().benchmark or load_params().benchmark)
    fetch_all(benchmark.downloads, project.ROOT / "data" / benchmark.name / "downloads")


if __name__ == "__main__":
    run_stage(main)
