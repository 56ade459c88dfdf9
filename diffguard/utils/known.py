"""Values that are there at this place, for the type checker and against mistakes."""

from typing import TypeVar

T = TypeVar("T")


def known(value: T | None) -> T:
    """A value that is not None at this place.

    Example:
        >>> known(3)
        3
    """
    assert value is not None
    return value
