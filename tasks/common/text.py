"""YAML that people write, names in it, and tables that people read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffguard.errors import DataError, SettingError
from diffguard.utils.text import read_text


def known_name(option: str, names: list[str], known: Any) -> None:
    """Raise a SettingError (a ValueError to pydantic's validators) if a name is not among the known."""
    for name in names:
        if name not in known:
            raise UnknownNameError(f"{option}: {name!r} is not one of {', '.join(known)}")


class UnknownNameError(SettingError, ValueError):
    """A setting names something that does not exist."""


class _OneOfEachKey(yaml.SafeLoader):
    """YAML whose mappings have each key once; PyYAML itself takes the last of two, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for node_of_key, _ in node.value:
            if node_of_key.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(node_of_key, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node_of_key.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    return "\n".join([_line(heads), "|" + "---|" * len(heads), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read_yaml(path: Path) -> Any:
    try:
        return yaml.load(read_text(path), _OneOfEachKey)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
