"""Sources of images, as settings of a benchmark file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffguard.errors import SettingError
from diffguard.settings import Settings


class Digits(Settings):
    """scikit-learn's handwritten digits of these classes."""

    kind: Literal["digits"]
    classes: list[int] = Field(min_length=1)


class Glyphs(Settings):
    """Characters at 8x8, as the digits were made; see `tasks.sources.synthetic.glyphs`."""

    kind: Literal["glyphs"]
    characters: str = Field(min_length=1)


class Letters(Settings):
    """Characters at any size, labelled by their place in `characters`; see `tasks.sources.synthetic.letters`."""

    kind: Literal["letters"]
    characters: str = Field(min_length=1)
    size: int = Field(ge=8)


class Patches(Settings):
    """Patches of photographs, in gray at 8x8 or in colour at any size; see `tasks.sources.synthetic.patches`."""

    unwritten = frozenset({"size"})

    kind: Literal["patches"]
    size: int | None = Field(default=None, ge=8, le=128)


class Noise(Settings):
    """Noise, gratings and blobs, in gray at 8x8 or in colour at any size; see `tasks.sources.synthetic.noise`."""

    unwritten = frozenset({"size"})

    kind: Literal["noise"]
    size: int | None = Field(default=None, ge=8, le=128)


class Folder(Settings):
    """Image files of a folder, at any depth; the first folder under it is the class.

    Attributes:
        classes: only these.
        exclude: not these.
        sort: the order of class folders that are all numbers, which no classes name: as numbers (2, 10) or as text
            (10, 2).
    """

    kind: Literal["folder"]
    path: str
    classes: list[str] | None = Field(default=None, min_length=1)
    exclude: list[str] = Field(default_factory=list)
    sort: Literal["numbers", "text"] | None = None


class ImageList(Settings):
    """An image list as OpenOOD has them: lines of ``path label``.

    Attributes:
        root: the folder that the paths in it begin at.
    """

    kind: Literal["list"]
    path: str
    root: str


class Torchvision(Settings):
    """A dataset of torchvision.datasets, of images and labels; it must be there already.

    Attributes:
        name: of its class, as CIFAR10.
        root: its folder.
        arguments: others of its constructor.
    """

    kind: Literal["torchvision"]
    name: str
    root: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _downloads_nothing(self) -> "Torchvision":
        if self.arguments.get("download"):
            raise ValueError(
                "arguments.download: nothing is downloaded here; use downloads, or put the files into root"
            )
        return self


class HuggingFace(Settings):
    """A dataset of the Hugging Face `datasets` library.

    Attributes:
        path: a folder (of `save_to_disk`, or of data files), or an id of the hub.
        split: as the library takes it: test, train[:10%], …
        image, label: names of its columns; label None: it has none.
        arguments: others of `datasets.load_dataset`, as name (its configuration) and revision.
    """

    kind: Literal["huggingface"]
    path: str
    split: str
    image: str = "image"
    label: str | None = "label"
    arguments: dict[str, Any] = Field(default_factory=dict)


SourceSettings = Annotated[
    Digits | Glyphs | Letters | Patches | Noise | Folder | ImageList | Torchvision | HuggingFace,
    Field(discriminator="kind"),
]
Drawn = (Digits, Glyphs, Letters, Patches, Noise)


def resolve(source: Any, root: str | None, project: Path) -> Any:
    """A source with {root} replaced in its places, and relative ones taken from the project's folder.

    Raises:
        SettingError: a place says {root}, and none is given.
    """
    places = {}
    for key in ("path", "root"):
        if (text := getattr(source, key, None)) is not None:
            full = project / place_of(text, root)
            # An id of a hub stays as it is.
            is_id = source.kind == "huggingface" and "{" not in text and not full.exists() and not text.startswith("/")
            places[key] = text if is_id else str(full)
    return source.model_copy(update=places)


def place_of(text: str, root: str | None) -> Path:
    """A path of a benchmark file, {root} replaced.

    Raises:
        SettingError: it says {root}, and none is given.
    """
    if "{root}" in text:
        if root is None:
            raise SettingError(f"{text}: root is not given (--root, or make evaluate ROOT=…, or root in params.yaml)")
        text = text.replace("{root}", root)
    return Path(text).expanduser()
