"""Sources that are image files: folders of class folders, and lists of paths with labels."""

from pathlib import Path

from diffguard.errors import DataError, SettingError
from diffguard.images import is_hidden, is_image, walk
from diffguard.utils.names import readable
from diffguard.utils.text import read_text
from tasks.sources.settings import Folder, ImageList


def folder_files(source: Folder) -> list[tuple[Path, str | None]]:
    """Return the image files of a folder in order of their paths, each with the name of its class folder, if any."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; mend the path in the benchmark file, or root")
    wanted = source.classes
    # A name that is not UTF-8 goes by its escaped form, the only one that can be stored.
    inner = {
        readable(path.name): path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path.name)
    }
    if missing := [name for name in [*(wanted or []), *source.exclude] if name not in inner]:
        raise DataError(f"{folder}: there is no class folder {missing[0]!r} in it")
    files: list[tuple[Path, str | None]] = []
    for name in inner:
        if (wanted is not None and name not in wanted) or name in source.exclude:
            continue
        paths = walk(inner[name]).images
        if not paths:
            raise DataError(f"{folder / name}: this class folder has no images; add some, or name it in exclude")
        files += [(path, name) for path in paths]
    if wanted is None:
        files += [(path, None) for path in sorted(folder.iterdir()) if is_image(path)]
    if not files:
        raise DataError(f"{folder}: no images in it")
    return files


def sorted_names(source: Folder) -> list[str]:
    """Return the sorted names of class folders; if text and numbers sort differently, in the order that `sort` sets.

    Raises:
        SettingError: the two orders differ and `sort` is not set.
    """
    as_text = sorted({name for _, name in folder_files(source) if name is not None})
    if not all(name.isdecimal() for name in as_text):
        return as_text
    as_numbers = sorted(as_text, key=lambda name: (int(name), name))
    if source.sort is None and as_text != as_numbers:
        raise SettingError(
            f"{source.path}: its class folders are numbers, and their labels depend on the order: set sort: numbers "
            f"({', '.join(as_numbers[:4])}, …) or sort: text ({', '.join(as_text[:4])}, …), as in training"
        )
    return as_numbers if source.sort == "numbers" else as_text


def list_lines(source: ImageList) -> list[tuple[Path, int]]:
    """Return the path and label of each line of an image list."""
    try:
        text = read_text(Path(source.path))
    except FileNotFoundError:
        raise DataError(f"{source.path}: no such image list; mend the path in the benchmark file, or root") from None
    if not Path(source.root).is_dir():
        raise DataError(f"{source.root}: no such folder; it is the root of the image list {source.path}")
    images = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        try:
            images.append((Path(source.root) / name.strip(), int(label)))
        except ValueError:
            raise DataError(f"{source.path}: line {number} is not `path label`: {line!r}") from None
        if not name:
            raise DataError(f"{source.path}: line {number} is not `path label`: {line!r}")
    if not images:
        raise DataError(f"{source.path}: the image list is empty")
    return images
