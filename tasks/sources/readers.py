"""READERS"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffguard.errors import DataError, SettingError
from diffguard.images import is_hidden, is_image, picture_of, to_format, walk
from diffguard.settings import ImageFormat
from diffguard.utils.names import readable
from diffguard.utils.text import first_line, read_text
from tasks.sources.settings import Digits, Drawn, Folder, HuggingFace, ImageList, Letters, Torchvision
from tasks.sources.synthetic import SOURCES


@dataclass
class Found:
    """An image of a source. What its file was is known once `image` was asked for.

    Attributes:
        label, class_name: either or both; neither in a folder without class folders.
        origin: the file, or the place in the dataset.
        open: returns the picture, or the content or path of its file.
        format: of the file, as Pillow names it; "" if there was none. width, height: in pixels.
        quality: of a JPEG file, about 1 to 100; 0 of other formats. bytes: of the file; 0: unknown.
    """

    label: int | None
    class_name: str | None
    origin: str
    open: Callable[[], "Image.Image | bytes | Path"]
    format: str = ""
    width: int = 0
    height: int = 0
    quality: int = 0
    bytes: int = 0

    @property
    def image(self) -> Image.Image:
        """The picture, decoded.

        Raises:
            DataError: it cannot be.
        """
        try:
            content = self.open()
            if isinstance(content, Image.Image):
                self.width, self.height = content.size
                return content
            encoded = content.read_bytes() if isinstance(content, Path) else content
            picture = picture_of(encoded, self.origin)
            with Image.open(io.BytesIO(encoded)) as file:
                self.format, self.bytes = file.format or "", len(encoded)
                self.width, self.height = file.size
                self.quality = _jpeg_quality(file)
            return picture
        except DataError as error:
            raise DataError(f"{error}; mend or remove it") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.origin}: the image cannot be read ({error}); mend or remove it") from None

    def formatted(self, form: ImageFormat) -> Image.Image:
        """The picture as the benchmark stores it.

        Raises:
            DataError: it cannot be read or brought into that shape.
        """
        picture = self.image
        try:
            return to_format(picture, form.size, form.mode, form.resize, self.origin)
        except DataError as error:
            raise DataError(f"{error}; mend or remove it") from None


def read_source(source: Any, rng: np.random.Generator) -> Iterator[Found]:
    """The images of a source, in random order; some drawn ones have no end.

    Raises:
        DataError: its files are missing or not what they should be.
    """
    if isinstance(source, Drawn):
        arguments = source.model_dump(exclude={"kind"})
        for number, (label, pixels) in enumerate(SOURCES[source.kind](rng, **arguments)):
            picture = Image.fromarray(pixels)
            yield Found(label, None, f"{source.kind} {number}", lambda picture=picture: picture)
        return
    size, at = _opened(source)
    for row in rng.permutation(size):
        yield at(int(row))


def listed(source: Any) -> Iterator[Found]:
    """All images of a source of files, in its own order, none of them read.

    Raises:
        DataError: its files are missing or not what they should be.
    """
    listing(source)  # which looks at each file that an image list names
    size, at = _opened(source)
    return map(at, range(size))


def count(source: Any) -> int | None:
    """How many images a source has; None: no end.

    Raises:
        DataError: its files are missing or not what they should be.
    """
    if isinstance(source, Digits):
        return sum(1 for _ in SOURCES["digits"](np.random.default_rng(0), classes=source.classes))
    return None if isinstance(source, Drawn) else _opened(source)[0]


def class_names(source: Any) -> list[str]:
    """The names of a source's classes, in the order of its labels; empty if it names none."""
    if isinstance(source, Folder):
        return source.classes or _sorted_names(source)
    if isinstance(source, Letters):
        return list(source.characters)
    if isinstance(source, Torchvision):
        return [str(name) for name in getattr(_torchvision(source), "classes", [])]
    if isinstance(source, HuggingFace):
        return list(getattr(_huggingface(source).features.get(source.label), "names", []))
    return []


def _sorted_names(source: Folder) -> list[str]:
    """The names of class folders, sorted; where two orders are possible, the one that was asked for.

    Raises:
        SettingError: none was.
    """
    as_text = sorted({name for _, name in _files(source) if name is not None})
    if not all(name.isdecimal() for name in as_text):
        return as_text
    as_numbers = sorted(as_text, key=lambda name: (int(name), name))
    if source.sort is None and as_text != as_numbers:
        raise SettingError(
            f"{source.path}: its class folders are numbers, and their labels depend on the order: set sort: numbers "
            f"({', '.join(as_numbers[:4])}, …) or sort: text ({', '.join(as_text[:4])}, …), as in training"
        )
    return as_numbers if source.sort == "numbers" else as_text


def listing(source: Any) -> list[Any]:
    """What tells whether a source's files have changed: names, sizes and times.

    Raises:
        DataError: one is missing, or they are not what they should be.
    """
    if isinstance(source, Folder):
        paths = [path for path, _ in _files(source)]
    elif isinstance(source, ImageList):
        named = [path for path, _ in _lines(source)]
        if missing := [path for path in named if not path.is_file()]:
            more = f", nor are {len(missing) - 1} more of its {len(named)} images" if len(missing) > 1 else ""
            raise DataError(
                f"{source.path}: it names {missing[0]}, which is not there{more}; bring it, or mend the list"
            )
        paths = [Path(source.path), *named]
    elif isinstance(source, Torchvision | HuggingFace):
        folder = Path(source.root if isinstance(source, Torchvision) else source.path)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        paths = []
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _opened(source: Any) -> tuple[int, Callable[[int], Found]]:
    """How many images a source of files has, and one by its number."""
    if isinstance(source, Folder):
        files = _files(source)

        def of_folder(row: int) -> Found:
            path, name = files[row]
            return Found(None, name, readable(path), lambda: path)

        return len(files), of_folder
    if isinstance(source, ImageList):
        lines = _lines(source)

        def of_list(row: int) -> Found:
            path, label = lines[row]
            return Found(label, None, readable(path), lambda: path)

        return len(lines), of_list
    return _of_torchvision(source) if isinstance(source, Torchvision) else _of_huggingface(source)


def _files(source: Folder) -> list[tuple[Path, str | None]]:
    """Image files in order of their paths, with the class folder that each is in."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; mend the path in the benchmark file, or root")
    wanted = source.classes
    # A name that is no UTF-8 is known by its escaped form, as nothing else could be stored.
    inner = {
        readable(path.name): path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path.name)
    }
    if missing := [name for name in [*(wanted or []), *source.exclude] if name not in inner]:
        raise DataError(f"{folder}: there is no class folder {missing[0]!r} in it")
    files: list[tuple[Path, str | None]] = []
    for name in inner:
        if (wanted is not None and name not in wanted) or name in source.exclude:
            continue
        found = walk(inner[name]).images
        if not found:
            raise DataError(f"{folder / name}: this class folder has no images; add some, or name it in exclude")
        files += [(path, name) for path in found]
    if wanted is None:
        files += [(path, None) for path in sorted(folder.iterdir()) if is_image(path)]
    if not files:
        raise DataError(f"{folder}: no images in it")
    return files


def passed_over(source: Any) -> str:
    """What is in the places of a source and is no image, in words; "" if nothing is."""
    return walk(Path(source.path)).told if isinstance(source, Folder) else ""


def _lines(source: ImageList) -> list[tuple[Path, int]]:
    try:
        text = read_text(Path(source.path))
    except FileNotFoundError:
        raise DataError(f"{source.path}: no such image list; mend the path in the benchmark file, or root") from None
    if not Path(source.root).is_dir():
        raise DataError(f"{source.root}: no such folder; it is the root of the image list {source.path}")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        try:
            found.append((Path(source.root) / name.strip(), int(label)))
        except ValueError:
            raise DataError(f"{source.path}: line {number} is not `path label`: {line!r}") from None
        if not name:
            raise DataError(f"{source.path}: line {number} is not `path label`: {line!r}")
    if not found:
        raise DataError(f"{source.path}: the image list is empty")
    return found


def _of_torchvision(source: Torchvision) -> tuple[int, Callable[[int], Found]]:
    dataset = _torchvision(source)
    names = class_names(source)

    def at(row: int) -> Found:
        # Opened twice: the label is needed first, the picture by another thread.
        label = _label_of(dataset, row)
        name = names[label] if 0 <= label < len(names) else None
        return Found(
            label, name, f"torchvision {source.name} under {source.root}, image {row}", lambda: dataset[row][0]
        )

    return len(dataset), at


def _label_of(dataset: Any, row: int) -> int:
    for key in ("targets", "labels", "_labels"):
        labels = getattr(dataset, key, None)
        if labels is not None and len(labels) == len(dataset):
            return int(labels[row])
    label = dataset[row][1]
    return int(label) if isinstance(label, int | np.integer) else -1


@lru_cache(maxsize=8)
def _torchvision_of(name: str, root: str, arguments: str) -> Any:
    import json

    from torchvision import datasets

    made = getattr(datasets, name, None)
    if not isinstance(made, type):
        raise SettingError(f"source: torchvision has no dataset {name!r}; it has {', '.join(datasets.__all__)}")
    try:
        return made(root, **json.loads(arguments))
    except (RuntimeError, OSError, ValueError, TypeError, EOFError) as error:
        reason = first_line(error)
        raise DataError(f"torchvision {name}: it cannot be read under {root} ({reason})") from None


def _torchvision(source: Torchvision) -> Any:
    import json

    return _torchvision_of(source.name, source.root, json.dumps(source.arguments, sort_keys=True))


def _of_huggingface(source: HuggingFace) -> tuple[int, Callable[[int], Found]]:
    import datasets

    rows = _huggingface(source)
    kind = rows.features[source.image]
    if isinstance(kind, datasets.Image):
        # As files: what they were stored as is told, and other threads decode them.
        rows = rows.cast_column(source.image, datasets.Image(decode=False))
    names = class_names(source)
    # A column by itself: of the images nothing is read.
    labels = rows[source.label][:] if source.label is not None else [None] * len(rows)

    def at(row: int) -> Found:
        label = labels[row]
        name = names[label] if names and label is not None and 0 <= label < len(names) else None
        if isinstance(label, str):
            label, name = None, label

        def held() -> bytes | Path:
            found = rows[row][source.image]
            if isinstance(found, dict):
                found = found["bytes"] if found.get("bytes") is not None else Path(found["path"])
            if not isinstance(found, bytes | Path):
                raise DataError(f"{origin}: column {source.image} holds no image")
            return found

        origin = f"{source.path}, split {source.split}, row {row}"
        return Found(label, name, origin, held)

    return len(rows), at


@lru_cache(maxsize=8)
def _huggingface_of(path: str, split: str, arguments: str) -> Any:
    import json

    import datasets

    folder = Path(path)
    try:
        if folder.is_dir() and any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise DataError(f"{path}: it has no split {split!r}; it has {', '.join(saved)}")
                return saved[split]
            return saved
        return datasets.load_dataset(path, split=split, **json.loads(arguments))
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers do
        reason = first_line(error)
        raise DataError(
            f"dataset {path}: it cannot be read ({reason}); without network, give a folder of its files as path"
        ) from None


def _huggingface(source: HuggingFace) -> Any:
    import json

    rows = _huggingface_of(source.path, source.split, json.dumps(source.arguments, sort_keys=True))
    for key in ("image", "label"):
        column = getattr(source, key)
        if column is not None and column not in rows.features:
            raise DataError(
                f"dataset {source.path}: it has no column {column!r} ({key}); it has {', '.join(rows.features)}"
            )
    return rows


_LUMINANCE = 3688.0
"""Sum of the luminance table of the JPEG standard (ITU T.81, annex K), which is quality 50."""


def _jpeg_quality(picture: Image.Image) -> int:
    """The quality, on the scale of the IJG's encoder, that a JPEG file's luminance table stands for."""
    tables = getattr(picture, "quantization", None)
    if not tables:
        return 0
    scale = 100 * sum(tables[min(tables)]) / _LUMINANCE
    return round(max(1.0, 5000 / scale if scale > 100 else (200 - scale) / 2))
