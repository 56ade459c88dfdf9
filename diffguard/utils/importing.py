"""Objects by ``package.module:name``."""

from importlib import import_module
from typing import Any

from diffguard.errors import SettingError


def import_object(name: str) -> Any:
    """The object that ``package.module:name`` names.

    Raises:
        SettingError: there is no such module or name.

    Example:
        >>> import_object("diffguard.classifiers:ConvClassifier").__name__
        'ConvClassifier'
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{name}: cannot be imported as package.module:name ({error})") from error
