"""What all settings are: frozen, typed, and strict about their keys."""

from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)

from diffguard.errors import SettingError

T = TypeVar("T")


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that nobody reads is an error.

    Attributes:
        unwritten: fields that are written only where they differ from their default. Scores, models and prepared
            images are named by the hash of what is written, so that a setting which came later leaves those names
            as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    unwritten: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unwritten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        left_out = {name for name in self.unwritten if getattr(self, name) == fields[name].default}
        return {name: value for name, value in values.items() if name not in left_out}

    def own(self) -> dict[str, Any]:
        """As plain values, without what was left at its default."""
        return self.model_dump(include=self.model_fields_set)


def parse_settings(kind: type[T], values: Any, where: str) -> T:
    """Check plain values against a settings class.

    Args:
        where: the file and section, for the message.

    Raises:
        SettingError: one line that names the first wrong key and what is wrong with it.

    Example:
        >>> parse_settings(list[int], ["4", 5], "params.yaml")
        [4, 5]
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise SettingError(f"{where}: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    first = details[0]
    key = "".join(letter if letter.isprintable() else "?" for letter in ".".join(map(str, first["loc"]))) or "value"
    shown = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
    more = f"; and {len(details) - 1} more" if len(details) > 1 else ""
    return f"{key}: {first['msg']}{shown}{more}"
