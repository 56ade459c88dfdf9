"""Imports objects by ``package.module:name``, and checks which of them an opened file may name.

Names that the user writes (an option, params.yaml, a benchmark file, an argument) are imported. Names in an opened file
(a classifier's file, a bundle, a reference) are imported only if they are listed here, are detectors of pytorch-ood, or
are trusted by the user who opens the file.
"""

import re
from collections.abc import Collection, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from diffguard.errors import DataError, SettingError

OWN = {
    "diffguard.detectors:HighFrequency",
    "diffguard.models.classifiers:ConvClassifier",
    "diffguard.models.classifiers:ResidualClassifier",
    "diffguard.models.classifiers:TransformerClassifier",
    "diffguard.models.classifiers:WhitenedClassifier",
}
"""What settings and stored files name of this library: by its package, so that the code in it can move."""

_FORMER = {
    "diffguard.classifiers:ConvClassifier": "diffguard.models.classifiers:ConvClassifier",
    "diffguard.classifiers:ResidualClassifier": "diffguard.models.classifiers:ResidualClassifier",
    "diffguard.complexity:HighFrequency": "diffguard.detectors:HighFrequency",
}
"""Names that files of earlier versions have."""

_DETECTORS = "pytorch_ood.detector"
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*)?")


def import_object(name: str) -> Any:
    """Import the object ``package.module:name``.

    Raises:
        SettingError: the module or the name does not exist.

    Example:
        >>> import_object("diffguard.models.classifiers:ConvClassifier").__name__
        'ConvClassifier'
    """
    module, _, attribute = current_name(name).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{name}: cannot be imported as package.module:name ({error})") from error


def current_name(name: str) -> str:
    """Return the current name of an object of this library that a file of an earlier version names.

    Example:
        >>> current_name("diffguard.complexity:HighFrequency"), current_name("my_models:make")
        ('diffguard.detectors:HighFrequency', 'my_models:make')
    """
    return _FORMER.get(name, name)


def check_names(names: Iterable[str], where: str | Path, trust: Collection[str] = ()) -> None:
    """Check that an opened file names only code that may be imported; nothing else is imported.

    Args:
        names: each ``package.module:name``.
        where: the file, for the message.
        trust: trusted code: ``package``, ``package.module`` or ``package.module:name``, with all that it contains.

    Raises:
        DataError: a name is neither known nor trusted. SettingError: an entry of trust has another form.

    Example:
        >>> check_names(["my_models:make"], "detector.json", trust=["my_models"])
        >>> check_names(["os:system"], "a.safetensors")
        Traceback (most recent call last):
            ...
        diffguard.errors.DataError: a.safetensors: it names the code os:system, which is not imported because a \
file says so; if you know who made the file, allow it: --trust-code os, or trust=["os"]
    """
    check_trust(trust)
    for name in names:
        if not is_known(name) and not _is_trusted(name, trust):
            module = name.partition(":")[0]
            raise DataError(
                f"{where}: it names the code {name}, which is not imported because a file says so; if you know who "
                f'made the file, allow it: --trust-code {module}, or trust=["{module}"]'
            )


def is_known(name: str) -> bool:
    """Whether any file may name it: an object of this library that is listed here, or a detector of pytorch-ood."""
    return current_name(name) in OWN or _is_detector(name)


def check_trust(trust: Collection[str]) -> None:
    """Check the form of a list of trusted code.

    Raises:
        SettingError: an entry is not ``package``, ``package.module`` or ``package.module:name``.
    """
    if isinstance(trust, str):
        raise SettingError(f"trust: {trust!r} is text; give a list of names")
    for entry in trust:
        if not _ENTRY.fullmatch(entry):
            raise SettingError(f"--trust-code: {entry!r} is not package, package.module or package.module:name")


def _is_trusted(name: str, trust: Collection[str]) -> bool:
    return any(name == entry or name.startswith((f"{entry}.", f"{entry}:")) for entry in trust)


def _is_detector(name: str) -> bool:
    """Whether it is a detector of pytorch-ood, and not something else that its module imports."""
    module, _, attribute = name.partition(":")
    if module != _DETECTORS:
        return False
    import pytorch_ood.detector
    from pytorch_ood.api import Detector

    value = getattr(pytorch_ood.detector, attribute, None)
    return isinstance(value, type) and issubclass(value, Detector)
